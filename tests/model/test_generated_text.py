"""Generated documents are right in what they say."""

from __future__ import annotations

from accullm_cli.model.generated_text import generated_document


def test_a_generated_document_depends_on_its_seed_alone() -> None:
    assert generated_document("calibration 0 1") == generated_document("calibration 0 1")
    documents = {generated_document(f"calibration 0 {number}") for number in range(100)}
    assert len(documents) == 100


def test_generated_sums_are_right() -> None:
    checked = 0
    for number in range(200):
        for line in generated_document(f"calibration 0 {number}").splitlines():
            left, _, right = line.rpartition(" = ")
            if left and set(left) <= set("0123456789 +-*/()="):
                assert eval(left.partition(" = ")[0]) == int(right)
                checked += 1
    assert checked > 100


def test_generated_foreign_keys_exist() -> None:
    checked = 0
    for number in range(200):
        lines = generated_document(f"calibration 0 {number}").splitlines()
        tables = [line.split()[2] for line in lines if line.startswith("CREATE TABLE")]
        if not tables:
            continue
        rows = [line.split(" VALUES (") for line in lines if line.startswith("INSERT INTO")]
        parents = {row[1].split(",")[0] for row in rows if row[0].endswith(tables[0])}
        children = [row[1].split(", ")[1] for row in rows if row[0].endswith(tables[1])]
        assert children
        assert set(children) <= parents
        checked += 1
    assert checked > 10


def test_generated_clauses_refer_to_clauses_that_exist() -> None:
    checked = 0
    for number in range(100):
        document = generated_document(f"calibration 0 {number}")
        clauses = {line.split()[0] for line in document.splitlines() if line[:1].isdigit() and "AGREEMENT" in document}
        for line in document.splitlines():
            if " Clause " in line:
                assert line.split(" Clause ")[1].split()[0] in clauses
                checked += 1
    assert checked > 20
