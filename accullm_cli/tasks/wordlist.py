"""Words that items are made of; none of them is a part of another."""

from __future__ import annotations

NAMES = (
    "Anna", "Boris", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hassan", "Ingrid", "Jonas", "Karin", "Luis",
    "Marta", "Nadia", "Oskar", "Petra", "Quinn", "Rosa", "Stefan", "Tamara", "Ulrich", "Vera", "Walter", "Yusuf",
)  # fmt: skip
PLACES = (
    "Aarhus", "Bergen", "Cadiz", "Dresden", "Exeter", "Faro", "Geneva", "Haifa", "Izmir", "Jaffa", "Kyoto", "Lyon",
    "Malmo", "Nantes", "Oslo", "Porto", "Quito", "Riga", "Siena", "Turin", "Utrecht", "Varna", "Windsor", "Zagreb",
)  # fmt: skip
THINGS = (
    "anchor", "basket", "candle", "drawer", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "teapot", "umbrella", "violin",
    "window", "yacht",
)  # fmt: skip
VERBS = (
    "admires", "borrows", "carries", "describes", "examines", "finds", "guards", "hides", "inspects", "keeps", "lends",
    "measures", "notices", "orders", "paints", "repairs", "sells", "tests", "visits", "weighs",
)  # fmt: skip
QUALITIES = (
    "amber", "broken", "cheap", "dusty", "early", "fragile", "green", "heavy", "ivory", "jagged", "large", "modern",
    "narrow", "old", "pale", "quiet", "round", "silver", "tiny", "useful", "velvet", "wooden", "yellow",
)  # fmt: skip


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
