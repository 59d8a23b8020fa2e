"""Tag schemes of sequence labelling: what a sentence's tags say about its entities, in whichever spelling.

The data sets of the field spell the same entities in several ways. For two neighbouring places and a person:

    tokens   New    York   Boston  likes  Ann
    iob1     I-LOC  I-LOC  B-LOC   O      I-PER   B- only where an entity touches one of its own type
    iob2     B-LOC  I-LOC  B-LOC   O      B-PER   B- at every beginning; models are trained and scored on this one
    bioes    B-LOC  E-LOC  S-LOC   O      S-PER   E- at the end of longer ones, S- for single tokens

BILOU writes L- and U- for E- and S-, BMES writes M- for the I- between. Tags without a type (B, I, O) are read as well.
Labels that are no such tags, such as parts of speech, have no entities: scheme `none`.

Every scheme is read as conlleval and seqeval's default mode read it, which knows no ill-formed sentence: a token inside
an entity goes on with the entity before it where that is open and of the same type, and otherwise begins one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import lru_cache

UNTYPED = "_"
"""The type of entities whose tags have none, as in seqeval."""

_TAG = re.compile(r"(?P<place>[BIESLUM])(?:-(?P<type>.*))?", re.DOTALL)
_PLACES = {"L": "E", "U": "S", "M": "I"}  # letters of BILOU and BMES
Read = tuple[str, str]
"""Place (B, I, E, S or O) and type of a tag; the type of O is empty."""
_OUTSIDE: Read = ("O", "")


class TagScheme(StrEnum):
    """How the tags of a data set spell entities. Made from any usual name: TagScheme("BILOU") is BIOES."""

    IOB1 = "iob1"
    """Also data with I- and O only."""
    IOB2 = "iob2"
    BIOES = "bioes"
    NONE = "none"
    """Each token has a label of its own, and there are no entities."""

    @classmethod
    def _missing_(cls, value: object) -> TagScheme | None:
        names = {
            "io": cls.IOB1,
            "iob": cls.IOB1,
            "bio": cls.IOB2,
            "iobes": cls.BIOES,
            "bilou": cls.BIOES,
            "bmes": cls.BIOES,
        }
        name = str(value).lower()
        return names.get(name) or cls.__members__.get(name.upper())


def detect_scheme(sequences: Iterable[Sequence[str]]) -> TagScheme:
    """The scheme of all sentences of a data set together, by the first rule that fits:

    1. A label that is neither O nor a tag: `none`; so are labels without types among which neither B nor I is, such as
       E and S for English and Spanish. `not_tags` names them. All labels are kept as they are.
    2. A tag with E, S, L, U or M: `bioes`.
    3. More entities that follow O, another type or the start of the sentence begin with I- than with B-: `iob1`. The
       two schemes differ in nothing else, and a few slips of the annotators do not decide.
    4. Otherwise, no entity at all included: `iob2`, whose tags stay as they are.

    No choice between rules 2, 3 and 4 loses anything, since `to_iob2` reads all of them alike; it decides what
    `count_illformed` complains about. Only `none` gives entities up.
    """
    beginnings = Counter[str]()
    labels: set[str] = set()
    for tags in sequences:
        labels.update(tags)
        previous_type = ""
        for place, type_ in (_read(tag) or _OUTSIDE for tag in tags):
            if type_ != previous_type:
                beginnings[place] += 1
            previous_type = type_
    if not_tags(labels):
        return TagScheme.NONE
    if any(label[0] in "ESLUM" for label in labels):
        return TagScheme.BIOES
    return TagScheme.IOB1 if beginnings["I"] > beginnings["B"] else TagScheme.IOB2


def not_tags(labels: Iterable[str]) -> list[str]:
    """The labels, sorted, that keep `detect_scheme` from finding a scheme. Where they are few among many tags, they are
    probably slips, such as 0 for O or b-PER for B-PER."""
    labels = set(labels)
    found = [label for label in labels if _read(label) is None]
    if not found and not any("-" in label or label in ("B", "I") for label in labels):
        found = [label for label in labels if label != "O"]
    return sorted(found)


def to_iob2(tags: Sequence[str], scheme: TagScheme) -> list[str]:
    """A sentence's tags, spelt in IOB2, with the same entities; labels of scheme `none` stay as they are.

    Raises ValueError where a label is no tag, or ends an entity (E-, S-) in a scheme that knows no such tags.
    """
    if scheme is TagScheme.NONE:
        return list(tags)
    return [
        place if type_ in ("", UNTYPED) else f"{place}-{type_}" for place, type_ in _in_iob2(_read_all(tags, scheme))
    ]


def count_illformed(tags: Sequence[str], scheme: TagScheme) -> int:
    """How often a sentence's tags break its scheme, by the places between two tokens and at either end.

    `iob1`: a B- that touches no entity of its type. `iob2`: an I- without an entity of its type to go on with. `bioes`:
    an entity that is not begun by B- or S-, or not ended by E- or S-. `none`: never. Raises ValueError as `to_iob2`.
    """
    if scheme is TagScheme.NONE:
        return 0
    count = 0
    previous_place, previous_type = _OUTSIDE
    for place, type_ in [*_read_all(tags, scheme), _OUTSIDE]:
        if scheme is TagScheme.IOB1:
            count += place == "B" and type_ != previous_type
        elif scheme is TagScheme.IOB2:
            count += place == "I" and type_ != previous_type
        else:
            is_open, goes_on = previous_place in ("B", "I"), place in ("I", "E")
            count += is_open != goes_on or (is_open and type_ != previous_type)
        previous_place, previous_type = place, type_
    return count


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last token (both included) of each entity of a sentence, as seqeval's `get_entities` gives them.

    Any sequence of tags is allowed, so that what a model predicts is read as labels are. Raises ValueError for a label
    that is no tag.
    """
    found: list[tuple[str, int, int]] = []
    for position, (place, type_) in enumerate(_in_iob2(_read_all(tags, TagScheme.BIOES))):
        if place == "B":
            found.append((type_, position, position))
        elif place == "I":
            found[-1] = (type_, found[-1][1], position)
    return found


def _in_iob2(read: Iterable[Read]) -> Iterator[Read]:
    """A sentence with places as IOB2 has them: where entities begin is decided here alone."""
    previous_place, previous_type = _OUTSIDE
    for place, type_ in read:
        goes_on = place in ("I", "E") and previous_place in ("B", "I") and type_ == previous_type
        yield "O" if place == "O" else "I" if goes_on else "B", type_
        previous_place, previous_type = place, type_


def _read_all(tags: Sequence[str], scheme: TagScheme) -> list[Read]:
    result = []
    for tag in tags:
        read = _read(tag)
        if read is None or (read[0] in ("E", "S") and scheme is not TagScheme.BIOES):
            allowed = "O, B-PER, I-PER" + (", E-PER, S-PER" if scheme is TagScheme.BIOES else "")
            raise ValueError(f"{tag!r} is no tag of the scheme {scheme}, which has tags such as {allowed}")
        result.append(read)
    return result


@lru_cache(maxsize=2**16)  # data sets have few labels and many tokens
def _read(label: str) -> Read | None:
    """Place and type of a tag; None where a label is no tag."""
    if label == "O":
        return _OUTSIDE
    match = _TAG.fullmatch(label)
    return (_PLACES.get(match["place"], match["place"]), match["type"] or UNTYPED) if match else None
