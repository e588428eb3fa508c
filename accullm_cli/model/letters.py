"""Letters in ten languages, a sentence a line: German, French, Spanish, Italian, Portuguese, Dutch, Polish, Russian,
Chinese and Japanese. What calibration sees and what is held out are about different things.
"""

from __future__ import annotations

from collections.abc import Mapping

from accullm_cli.model.packaged_text import Part

# The first sentence opens a letter, the others follow in any order.
Letter = tuple[str, ...]

_HELD_OUT: tuple[Letter, ...] = (
    (  # German
        "Sehr geehrte Frau {name}, vielen Dank für Ihre Bestellung Nr. {number} vom {date}.",
        "Leider verzögert sich die Lieferung nach {town} um einige Tage, weil ein Bauteil noch nicht eingetroffen ist.",
        "Wir bitten Sie, uns bis Ende der Woche mitzuteilen, ob Sie mit einer Teillieferung einverstanden sind.",
        "Der Betrag von {number} Euro wird erst fällig, wenn alle Geräte geprüft und übergeben worden sind.",
        "Sollten Sie Fragen haben, erreichen Sie unsere Werkstatt täglich zwischen acht und siebzehn Uhr.",
        "Nach der Übergabe erklärt Ihnen ein Techniker, wie die Anlage gewartet und im Winter abgeschaltet wird.",
    ),
    (  # French
        "Madame {name}, nous vous remercions de votre commande n° {number} du {date}.",
        "Malheureusement, la livraison à {town} aura quelques jours de retard, car une pièce n'est pas encore arrivée.",
        "Nous vous prions de nous dire avant la fin de la semaine si une livraison partielle vous convient.",
        "La somme de {number} euros ne sera due qu'une fois tous les appareils vérifiés et remis.",
        "Pour toute question, notre atelier vous répond chaque jour entre huit heures et dix-sept heures.",
        "Après la remise, un technicien vous montrera comment entretenir l'installation et l'arrêter en hiver.",
    ),
    (  # Spanish
        "Estimada señora {name}: le agradecemos su pedido n.º {number} del {date}.",
        "Por desgracia, la entrega en {town} se retrasará unos días porque todavía no ha llegado una pieza.",
        "Le rogamos que nos comunique antes del fin de semana si acepta una entrega parcial.",
        "El importe de {number} euros no vence hasta que todos los aparatos hayan sido revisados y entregados.",
        "Si tiene alguna pregunta, nuestro taller atiende todos los días de ocho a diecisiete horas.",
        "Después de la entrega, un técnico le explicará cómo mantener la instalación y apagarla en invierno.",
    ),
    (  # Italian
        "Gentile signora {name}, La ringraziamo per l'ordine n. {number} del {date}.",
        "Purtroppo la consegna a {town} ritarderà di alcuni giorni, perché un pezzo non è ancora arrivato.",
        "La preghiamo di comunicarci entro la fine della settimana se accetta una consegna parziale.",
        "L'importo di {number} euro sarà dovuto solo quando tutti gli apparecchi saranno stati controllati.",
        "Per qualsiasi domanda la nostra officina risponde ogni giorno dalle otto alle diciassette.",
        "Dopo la consegna un tecnico Le spiegherà come curare l'impianto e come spegnerlo d'inverno.",
    ),
    (  # Portuguese
        "Prezada senhora {name}, agradecemos a sua encomenda n.º {number} de {date}.",
        "Infelizmente, a entrega em {town} vai atrasar alguns dias, porque uma peça ainda não chegou.",
        "Pedimos que nos diga até ao fim da semana se aceita uma entrega parcial.",
        "O valor de {number} euros só será devido quando todos os aparelhos tiverem sido verificados e entregues.",
        "Se tiver perguntas, a nossa oficina atende todos os dias entre as oito e as dezassete horas.",
        "Depois da entrega, um técnico vai explicar como cuidar da instalação e como desligá-la no inverno.",
    ),
    (  # Dutch
        "Geachte mevrouw {name}, hartelijk dank voor uw bestelling nr. {number} van {date}.",
        "Helaas komt de levering in {town} enkele dagen later, omdat een onderdeel nog niet is aangekomen.",
        "Wij verzoeken u ons voor het einde van de week te laten weten of een deellevering goed is.",
        "Het bedrag van {number} euro hoeft pas betaald te worden als alle toestellen zijn nagekeken.",
        "Voor vragen is onze werkplaats elke dag tussen acht en zeventien uur bereikbaar.",
        "Na de overdracht legt een monteur uit hoe u de installatie onderhoudt en in de winter uitschakelt.",
    ),
    (  # Polish
        "Szanowna Pani {name}, dziękujemy za zamówienie nr {number} z dnia {date}.",
        "Niestety dostawa do miasta {town} opóźni się o kilka dni, ponieważ jedna część jeszcze nie dotarła.",
        "Prosimy o informację do końca tygodnia, czy zgadza się Pani na dostawę częściową.",
        "Kwota {number} euro będzie należna dopiero po sprawdzeniu i przekazaniu wszystkich urządzeń.",
        "W razie pytań nasz warsztat jest dostępny codziennie od ósmej do siedemnastej.",
        "Po odbiorze technik wyjaśni, jak dbać o instalację i jak wyłączyć ją na zimę.",
    ),
    (  # Russian
        "Уважаемая госпожа {name}, благодарим вас за заказ № {number} от {date}.",
        "К сожалению, доставка в город {town} задержится на несколько дней, так как одна деталь ещё не пришла.",
        "Просим сообщить нам до конца недели, согласны ли вы на частичную поставку.",
        "Сумму в {number} евро нужно заплатить только после проверки и передачи всех приборов.",
        "Если у вас есть вопросы, наша мастерская отвечает ежедневно с восьми до семнадцати часов.",
        "После передачи техник объяснит, как ухаживать за установкой и как отключать её зимой.",
    ),
    (  # Chinese
        "尊敬的{name}女士,感谢您于{date}提交的第{number}号订单。",
        "很遗憾,由于一个零件尚未到货,发往{town}的货物将推迟几天。",
        "请您在本周末之前告诉我们是否同意分批交货。",
        "{number}欧元的款项在所有设备检验并交付之后才需要支付。",
        "如果您有任何问题,我们的车间每天八点到十七点都可以联系。",
        "交付之后,技术人员会说明如何保养设备,以及冬天怎样关闭它。",
    ),
    (  # Japanese
        "{name}様、{date}のご注文(番号{number})をありがとうございます。",
        "申し訳ございませんが、部品がまだ届いていないため、{town}への配達は数日遅れます。",
        "分割での納品でよろしいかどうか、今週末までにお知らせください。",
        "{number}ユーロのお支払いは、すべての機器の検査と引き渡しが終わってからで結構です。",
        "ご質問がございましたら、工場は毎日八時から十七時まで受け付けております。",
        "引き渡しの後、技術者が設備の手入れの方法と冬に止める方法をご説明します。",
    ),
)

_CALIBRATION: tuple[Letter, ...] = (
    (  # German
        "Liebe {name}, am {date} öffnet in {town} die neue Stadtbibliothek, und du bist herzlich eingeladen.",
        "Im Erdgeschoss stehen rund {number} Bücher, die jeder ohne Anmeldung lesen darf.",
        "Wer lieber zuhört, findet im ersten Stock Aufnahmen von Märchen, Gedichten und alten Liedern.",
        "Nachmittags lesen Schüler ihren Großeltern vor, und danach gibt es Tee und Kuchen.",
        "Bitte bring deine eigene Tasse mit, denn wir wollen möglichst wenig wegwerfen.",
    ),
    (  # French
        "Chère {name}, le {date}, la nouvelle bibliothèque de {town} ouvre ses portes, et tu es invitée.",
        "Au rez-de-chaussée se trouvent environ {number} livres que chacun peut lire sans inscription.",
        "Ceux qui préfèrent écouter trouveront au premier étage des contes, des poèmes et de vieilles chansons.",
        "L'après-midi, des élèves font la lecture à leurs grands-parents, puis on sert du thé et des gâteaux.",
        "Apporte ta propre tasse, s'il te plaît, car nous voulons jeter le moins possible.",
    ),
    (  # Spanish
        "Querida {name}: el {date} se inaugura en {town} la nueva biblioteca municipal, y estás invitada.",
        "En la planta baja hay unos {number} libros que cualquiera puede leer sin inscribirse.",
        "Quien prefiera escuchar encontrará en el primer piso cuentos, poemas y canciones antiguas.",
        "Por la tarde los alumnos leen en voz alta a sus abuelos, y después hay té y pasteles.",
        "Por favor, trae tu propia taza, porque queremos tirar lo menos posible.",
    ),
    (  # Italian
        "Cara {name}, il {date} apre a {town} la nuova biblioteca comunale, e tu sei invitata.",
        "Al piano terra ci sono circa {number} libri che tutti possono leggere senza iscriversi.",
        "Chi preferisce ascoltare trova al primo piano fiabe, poesie e vecchie canzoni.",
        "Di pomeriggio gli alunni leggono ai loro nonni, e poi ci sono tè e dolci.",
        "Porta la tua tazza, per favore, perché vogliamo buttare via il meno possibile.",
    ),
    (  # Portuguese
        "Querida {name}, no dia {date} abre em {town} a nova biblioteca municipal, e está convidada.",
        "No rés-do-chão há cerca de {number} livros que todos podem ler sem se inscrever.",
        "Quem preferir ouvir encontra no primeiro andar contos, poemas e canções antigas.",
        "À tarde, os alunos leem para os avós, e depois há chá e bolos.",
        "Por favor, traga a sua própria chávena, porque queremos deitar fora o menos possível.",
    ),
    (  # Dutch
        "Lieve {name}, op {date} gaat in {town} de nieuwe bibliotheek open, en je bent van harte uitgenodigd.",
        "Op de begane grond staan ongeveer {number} boeken die iedereen zonder inschrijving mag lezen.",
        "Wie liever luistert, vindt op de eerste verdieping sprookjes, gedichten en oude liedjes.",
        "In de middag lezen leerlingen hun grootouders voor, en daarna is er thee met taart.",
        "Neem alsjeblieft je eigen kopje mee, want we willen zo weinig mogelijk weggooien.",
    ),
    (  # Polish
        "Droga {name}, dnia {date} w mieście {town} zostanie otwarta nowa biblioteka i serdecznie Cię zapraszamy.",
        "Na parterze stoi około {number} książek, które każdy może czytać bez zapisywania się.",
        "Kto woli słuchać, znajdzie na pierwszym piętrze bajki, wiersze i stare piosenki.",
        "Po południu uczniowie czytają na głos swoim dziadkom, a potem jest herbata i ciasto.",
        "Prosimy przynieść własny kubek, bo chcemy wyrzucać jak najmniej.",
    ),
    (  # Russian
        "Дорогая {name}, {date} в городе {town} открывается новая библиотека, и мы приглашаем тебя.",
        "На первом этаже стоит около {number} книг, которые каждый может читать без записи.",
        "Кто больше любит слушать, найдёт на втором этаже сказки, стихи и старые песни.",
        "Днём школьники читают вслух своим бабушкам и дедушкам, а потом все пьют чай с пирогом.",
        "Пожалуйста, принеси свою чашку, потому что мы хотим выбрасывать как можно меньше.",
    ),
    (  # Chinese
        "亲爱的{name},{town}的新图书馆将在{date}开门,我们诚挚地邀请你来。",
        "一楼大约有{number}本书,任何人不用登记就可以阅读。",
        "喜欢听的人可以在二楼听到童话、诗歌和老歌。",
        "下午学生们给爷爷奶奶朗读,然后大家一起喝茶吃蛋糕。",
        "请带上自己的杯子,因为我们想尽量少扔东西。",
    ),
    (  # Japanese
        "{name}さん、{date}に{town}で新しい図書館が開館しますので、ぜひお越しください。",
        "一階にはおよそ{number}冊の本があり、だれでも登録なしで読むことができます。",
        "聞くほうが好きな人のために、二階には昔話や詩や古い歌があります。",
        "午後には生徒たちが祖父母に本を読み聞かせ、そのあとお茶とお菓子が出ます。",
        "できるだけごみを減らしたいので、自分のカップを持ってきてください。",
    ),
)

LETTERS: Mapping[Part, tuple[Letter, ...]] = {"calibration": _CALIBRATION, "held out": _HELD_OUT}
