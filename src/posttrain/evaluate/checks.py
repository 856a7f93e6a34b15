"""Rules that check whether an answer follows an instruction. They need no judge model and no torch.

`starter/evaluation/instructions.jsonl` gives each prompt a list of checks such as `{"kind": "bullets", "n": 3}`. The evaluation
generates one answer per prompt and calls `check` for each of them. A prompt counts as followed when all its checks pass, so the
measure is a share of prompts, as in IFEval (Zhou et al. 2023).

The checks cover form, counts, given words, the language and closed answers ("yes", "geese"). They do not judge whether an
answer is true or good. An answer without a visible character fails every check. One trailing newline is removed first, since
many models end a turn with one.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Item = Mapping[str, Any]  # one check as read from JSON: "kind" and that kind's parameters

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+|(?<=\d)[.,]\d+)*")
_BULLET = re.compile(r"\s*[-*•]\s+(\S.*)")
_NUMBER = re.compile(r"\s*(\d{1,3})[.)]\s+(\S.*)")
_TABLE_RULE = re.compile(r"\s*\|?(\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
# A full stop inside these does not end a sentence.
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|a\.m|p\.m|U\.S|U\.K)\.(?=\s+\S)")
_CLOSERS = r"[\"'”’»)\]*]*"
_END = re.compile(rf"[.!?…]+{_CLOSERS}(?=\s+[^\sa-zà-ÿ]|\s*$)")
_FINISHED = re.compile(rf"[.!?…]{_CLOSERS}\s*$")
_WRAPPING = " \t\r\n.,;:!?¡¿\"'“”‘’«»*_`()[]"


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Function words and greetings. A word may belong to several languages. The language with most words wins; a tie is no result.
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "en": _words_of(
        "the a an of and to in is are was were be it that this these with for on at by from as or but not you your he "
        "she they we my his her their our have has had will would can there which who what because hello thanks i do "
        "does did so if me some when"
    ),
    "es": _words_of(
        "el la los las un una unos unas de del y e que en es son está están estoy hay con por para no se su sus mi mis "
        "tu lo al más pero como muy me te le gusta este esta esto porque yo él ella nosotros tiene tengo cuando donde "
        "hoy hola gracias o ser fue era"
    ),
    "fr": _words_of(
        "le la les un une des de du et que qui en est sont dans avec pour pas ne se sa son ses mon ma mes ton ta "
        "au aux plus mais comme très je tu il elle nous vous ils elles on ce cette ces car où il y a c'est j'ai d'un "
        "d'une aujourd'hui bonjour merci sur sous été ou fait"
    ),
    "de": _words_of(
        "der die das den dem des ein eine einen einem einer und ist sind war in im am zu zum zur mit für auf von vom "
        "nicht sich sein seine ihr ihre mein meine ich du er sie es wir man kann hat haben aber wie sehr auch bei beim "
        "oder wenn weil wird dass hallo danke guten kauft"
    ),
    "it": _words_of(
        "il lo la i gli le un uno una di del della dei delle dello e che in è sono nel nella con per non si suo sua "
        "mio mia al alla ai più ma come molto mi ti ho ha questo questa perché io lui lei noi c'è anche quando dove "
        "sul sulla dal ciao grazie era un'"
    ),
}
# Letters (almost) unique to one of the five languages. Each counts as a word.
_LETTERS = {"es": "ñ¿¡", "fr": "çœêëîûâ", "de": "ßäü", "it": "ìò"}


def words(text: str) -> list[str]:
    """The words of `text`; a hyphen, an apostrophe and a decimal point do not split a word."""
    return _WORD.findall(text)


def detect_language(text: str) -> str | None:
    """The language with most function words in `text`: en, es, fr, de, it, or None for a tie or no function words."""
    parts = [word.replace("’", "'").casefold() for word in words(text)]
    # "l'eau" and "un'ora": the article before the apostrophe counts too.
    parts += [part.partition("'")[0] for part in parts if "'" in part]
    counts = {code: sum(part in vocabulary for part in parts) for code, vocabulary in FUNCTION_WORDS.items()}
    for code, letters in _LETTERS.items():
        counts[code] += sum(letter in letters for letter in text.lower())
    best = max(counts.values())
    winners = [code for code, count in counts.items() if count == best]
    return winners[0] if best > 0 and len(winners) == 1 else None


def _lines(answer: str) -> list[str]:
    return [line for line in answer.splitlines() if line.strip()]


def _normalised(text: str) -> str:
    """Normalise case, quotes, end marks and spaces for comparison."""
    return " ".join(text.casefold().replace("’", "'").split()).strip(_WRAPPING)


def _contains_word(word: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def _list_lines(answer: str) -> list[str]:
    """The lines of a list, without an introductory line that ends with a colon."""
    lines = _lines(answer)
    return lines[1:] if len(lines) > 1 and lines[0].rstrip(" *").endswith(":") else lines


def _max_words(answer: str, item: Item) -> bool:
    return bool(1 <= len(words(answer)) <= item["n"])


def _min_words(answer: str, item: Item) -> bool:
    return bool(len(words(answer)) >= item["n"])


def _word_count(answer: str, item: Item) -> bool:
    return bool(len(words(answer)) == item["n"])


def _one_of(answer: str, item: Item) -> bool:
    return _normalised(answer) in {_normalised(value) for value in item["values"]}


def _pattern(answer: str, item: Item) -> bool:
    return re.fullmatch(item["pattern"], answer.strip()) is not None


def _line_count(answer: str, item: Item) -> bool:
    return bool(len(_lines(answer)) == item["n"])


def _bullets(answer: str, item: Item) -> bool:
    lines = _list_lines(answer)
    return len(lines) == item["n"] and all(_BULLET.fullmatch(line) for line in lines)


def _numbered(answer: str, item: Item) -> bool:
    matches = [_NUMBER.fullmatch(line) for line in _list_lines(answer)]
    return [int(match[1]) if match else None for match in matches] == list(range(1, item["n"] + 1))


def _comma_items(answer: str, item: Item) -> bool:
    parts = answer.strip().split(",")
    return len(_lines(answer)) == 1 and len(parts) == item["n"] and all(words(part) for part in parts)


def _sentences(answer: str, item: Item) -> bool:
    if _FINISHED.search(answer) is None:  # a truncated sentence does not count
        return False
    text = _ABBREVIATION.sub("abbreviation", answer)
    count = 0
    for line in _lines(text):
        # Text after the last end mark of a line (a heading, a list item) counts as a sentence.
        count += sum(1 for part in _END.split(line) if words(part))
    return bool(count == item["n"])


def _json_keys(answer: str, item: Item) -> bool:
    fenced = _FENCE.fullmatch(answer.strip())
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(item["keys"]) and all(v not in ("", None) for v in value.values())


def _starts_with(answer: str, item: Item) -> bool:
    return answer.lstrip().startswith(item["text"])


def _ends_with(answer: str, item: Item) -> bool:
    return answer.rstrip(" ").endswith(item["text"])


def _includes(answer: str, item: Item) -> bool:
    return all(_contains_word(word, answer) for word in item["words"])


def _includes_any(answer: str, item: Item) -> bool:
    return any(_contains_word(word, answer) for word in item["words"])


def _avoids(answer: str, item: Item) -> bool:
    return bool(words(answer)) and not _includes_any(answer, item)


def _without(answer: str, item: Item) -> bool:
    return bool(words(answer)) and not set(answer) & set(item["characters"])


def _uppercase(answer: str, item: Item) -> bool:
    return answer.isupper()


def _lowercase(answer: str, item: Item) -> bool:
    return answer.islower()


def _quoted(answer: str, item: Item) -> bool:
    text = answer.strip()
    return len(words(text)) > 0 and text[0] in '"“' and text[-1] in '"”'


def _language(answer: str, item: Item) -> bool:
    return bool(detect_language(answer) == item["code"])


def _items_start_with(answer: str, item: Item) -> bool:
    parts = [re.sub(r"^\s*(?:[-*•]|\d+[.)]|and\b)?\s*", "", part) for part in re.split(r"[,\n]", answer)]
    return all(part.casefold().startswith(item["letter"].casefold()) for part in parts if part)


def _table(answer: str, item: Item) -> bool:
    """A Markdown table and nothing else: a header, a rule of dashes, then `rows` rows of `columns` cells."""
    lines = _lines(answer)
    if len(lines) != item["rows"] + 2 or _TABLE_RULE.fullmatch(lines[1]) is None:
        return False
    cells = [line.strip().removeprefix("|").removesuffix("|").split("|") for line in lines]
    return all("|" in line for line in lines) and all(len(row) == item["columns"] for row in cells)


class Kind(NamedTuple):
    """One kind of check: its function of (answer, check) and its parameters."""

    passes: Callable[[str, Item], bool]
    parameters: Mapping[str, type]


KINDS: dict[str, Kind] = {
    "max_words": Kind(_max_words, {"n": int}),
    "min_words": Kind(_min_words, {"n": int}),
    "word_count": Kind(_word_count, {"n": int}),
    "one_of": Kind(_one_of, {"values": list}),
    "pattern": Kind(_pattern, {"pattern": str}),
    "lines": Kind(_line_count, {"n": int}),
    "bullets": Kind(_bullets, {"n": int}),
    "numbered": Kind(_numbered, {"n": int}),
    "comma_items": Kind(_comma_items, {"n": int}),
    "sentences": Kind(_sentences, {"n": int}),
    "json_keys": Kind(_json_keys, {"keys": list}),
    "starts_with": Kind(_starts_with, {"text": str}),
    "ends_with": Kind(_ends_with, {"text": str}),
    "includes": Kind(_includes, {"words": list}),
    "includes_any": Kind(_includes_any, {"words": list}),
    "avoids": Kind(_avoids, {"words": list}),
    "without": Kind(_without, {"characters": str}),
    "uppercase": Kind(_uppercase, {}),
    "lowercase": Kind(_lowercase, {}),
    "quoted": Kind(_quoted, {}),
    "language": Kind(_language, {"code": str}),
    "items_start_with": Kind(_items_start_with, {"letter": str}),
    "table": Kind(_table, {"columns": int, "rows": int}),
}


def check(item: Item, answer: str) -> bool:
    """Whether `answer` passes the check `item`. Raises ValueError if the check is invalid."""
    passes = _usable(item).passes
    text = answer.removesuffix("\n")
    return bool(text.strip()) and passes(text, item)


def _usable(item: Item) -> Kind:
    """The kind of a check. Raises ValueError if its parameters are invalid."""
    kind = KINDS.get(item["kind"]) if isinstance(item.get("kind"), str) else None
    if kind is None:
        raise ValueError(f"check · kind {item.get('kind')!r} is unknown · allowed: {', '.join(KINDS)}")
    where = f"check {item['kind']!r}"
    parameters = set(item) - {"kind"}
    if parameters != set(kind.parameters):
        names = ", ".join(kind.parameters) or "no parameters"
        raise ValueError(f"{where} · has the parameters {sorted(parameters)} · allowed: {names}")
    for name, kind_of_value in kind.parameters.items():
        if not _has_type(item[name], kind_of_value):
            raise ValueError(f"{where} · {name} = {item[name]!r} · allowed: {_ALLOWED[kind_of_value]}")
    _check_values(where, item)
    return kind


_ALLOWED: dict[type, str] = {
    int: "a whole number of at least 1",
    str: "a non-empty text",
    list: "a list of non-empty texts",
}


def _has_type(value: object, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(part, str) and part for part in value)
    return isinstance(value, str) and value != ""


def _check_values(where: str, item: Item) -> None:
    if item["kind"] == "language" and item["code"] not in FUNCTION_WORDS:
        raise ValueError(f"{where} · code = {item['code']!r} · allowed: {', '.join(FUNCTION_WORDS)}")
    if item["kind"] == "pattern":
        try:
            re.compile(item["pattern"])
        except re.error as error:
            raise ValueError(f"{where} · pattern = {item['pattern']!r} · allowed: a regular expression ({error})") from error
