"""A prompt of a given length: cut or filled to a number of tokens, start and end of each chunk included."""

from __future__ import annotations

from typing import Any

# One token each in CLIP's vocabulary.
_FILLERS = ("sea", "sky", "sun", "tree", "light", "stone", "wind", "sand")
CHUNK = 77


def count_tokens(clip: Any, text: str) -> int:
    """Tokens of a text as the text encoder counts them, without start, end and padding."""
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    return sum(1 for chunk in chunks for token in chunk if token[2] != 0)


def prompt_of_length(clip: Any, text: str, tokens: int) -> str:
    """The words of `text`, cut or filled so that whole chunks of 77 hold `tokens`, each with its start and end."""
    wanted = max(tokens - 2 * -(-tokens // CHUNK), 0)
    words: list[str] = []
    count = 0
    for word in text.split():
        length = count_tokens(clip, word)
        if count + length > wanted:
            break
        words.append(word)
        count += length
    words += [_FILLERS[index % len(_FILLERS)] for index in range(wanted - count)]
    return " ".join(words)
