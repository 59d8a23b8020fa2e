"""The shape of a word as a feature: what an uncased tokenizer drops, and names are told by.

It is given to a model as token types: type 0 for tokens of no word, one type for each class of words at the first token
of a word, and another one at its further tokens.
"""

from __future__ import annotations

CLASSES = ("lower", "Title", "UPPER", "one capital", "miXed", "digits", "letters and digits", "other")
NUM_TOKEN_TYPES = 1 + 2 * len(CLASSES)


def token_type(word: str, is_first: bool) -> int:
    """The type of a token of a word."""
    return 1 + _class(word) + (0 if is_first else len(CLASSES))


def _class(word: str) -> int:
    letters = [character for character in word if character.isalpha()]
    has_digit = any(character.isdigit() for character in word)
    if not letters:
        return 5 if has_digit else 7
    if has_digit:
        return 6
    if all(letter.islower() for letter in letters):
        return 0
    if all(letter.isupper() for letter in letters):
        return 3 if len(letters) == 1 else 2
    if word[0].isupper() and all(letter.islower() for letter in letters[1:]):
        return 1
    return 4
