"""Text for evaluation: long documents for perplexity, sentences to hide a needle among."""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from endprompt.errors import UserError

_SENTENCE_END = re.compile(r"(?<=[.!?]) +")


@dataclass(frozen=True)
class Document:
    """One text file. digest: sha256 of its bytes, so that results know which text they were made on."""

    name: str
    text: str
    digest: str


def read_documents(files: list[str]) -> list[Document]:
    """Read UTF-8 text files, one document each. Raises UserError for a file that is missing, empty or not UTF-8."""
    documents = []
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(file, "no such text file", "give plain text files after --text")
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(file, f"is not UTF-8 (byte {error.start})", "convert it to UTF-8") from None
        if not text.strip():
            raise UserError(file, "holds no text", "remove it from --text")
        documents.append(Document(file.name, text, hashlib.sha256(raw).hexdigest()))
    return documents


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without special tokens and without the warning about long input, which is the point here."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text (`<s>`, `<|begin_of_text|>` or nothing): models meet it at position 0."""
    plain, whole = encode(tokenizer, "a"), tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise UserError("tokenizer", "its special tokens change the tokens of the text", "use a tokenizer that only adds tokens around it")


class Filler:
    """Sentences to hide a needle among: consecutive sentences of documents, or the built-in ones in a random order."""

    def __init__(self, documents: list[Document] | None = None):
        """documents: where the sentences come from, joined in the given order; None takes the built-in sentences."""
        self.built_in = not documents
        self.sentences = list(SENTENCES)
        if documents:
            found = (_SENTENCE_END.split(" ".join(d.text.split())) for d in documents)
            self.sentences = [s for sentences in found for s in sentences if s]

    def sample(self, rng: random.Random, characters: int) -> list[str]:
        """Sentences of at least `characters` in all, from a random start, or all there are from there round to the start.

        The built-in sentences are shuffled and repeat; those of documents keep their order and never repeat.
        """
        chosen, total = [], 0
        if self.built_in:
            while total < characters:
                shuffled = rng.sample(self.sentences, len(self.sentences))
                chosen += shuffled
                total += sum(len(s) + 1 for s in shuffled)
            return chosen
        start = rng.randrange(len(self.sentences))
        for offset in range(len(self.sentences)):
            chosen.append(self.sentences[(start + offset) % len(self.sentences)])
            total += len(chosen[-1]) + 1
            if total >= characters:
                break
        return chosen


SENTENCES = (
    "The baker opened the shop before sunrise and swept the floor.",
    "A light rain had fallen during the night and the street was still wet.",
    "Two children walked to school along the river, talking about a game.",
    "The old bridge was closed for repairs until the end of the month.",
    "She put the letters in a drawer and went to make some tea.",
    "The train left the station a few minutes late, as it often did.",
    "Behind the house there was a small garden with roses and beans.",
    "He had read the book once before, many years earlier, at school.",
    "The wind came from the north and the boats stayed in the harbor.",
    "Nobody in the village could remember when the mill had been built.",
    "A grey cat slept on the warm stones near the kitchen door.",
    "The teacher wrote a short list on the board and asked for questions.",
    "They painted the fence green because there was no other color left.",
    "On market days the square filled with farmers selling fruit and cheese.",
    "The doctor told him to walk every morning and to eat less salt.",
    "From the top of the hill one could see the whole valley.",
    "The carpenter measured the table again before he cut the wood.",
    "It was quiet in the library except for the sound of turning pages.",
    "Her brother worked in the city and came home on weekends.",
    "The soup was too hot, so they waited and talked about the weather.",
    "Several trees had lost their leaves although it was only September.",
    "The clock in the hall struck the hour and then stopped.",
    "A long line of people waited in front of the theater.",
    "The farmer repaired the gate so that the sheep would stay inside.",
    "In winter the lake froze and the children skated on it after school.",
    "The new road made the journey to the coast much shorter.",
    "She learned to play the piano from her neighbor, who asked for no money.",
    "The museum bought an old map and hung it near the entrance.",
    "After dinner they cleared the plates and played cards until late.",
    "The dog ran ahead on the path and waited at every corner.",
    "A blue door stood at the end of the narrow lane.",
    "The gardener planted onions next to the carrots, as his father had done.",
    "Most of the shops on the main street close early on Sunday.",
    "The captain studied the sky and decided to leave in the afternoon.",
    "There was enough bread for everyone, and some was left for the birds.",
    "The students carried the chairs outside because the room was too warm.",
    "An owl lived in the tower of the church and was seldom seen.",
    "He wrapped the glasses in paper and put them in a wooden box.",
    "The stream behind the farm runs dry in the summer.",
    "They met at the corner every morning and walked to work together.",
    "The tailor kept his needles in a tin that had once held tobacco.",
    "A thin layer of dust covered the shelves in the back room.",
    "The orchestra practiced in the old hall on Tuesday evenings.",
    "Her grandmother told the same story each time, with small changes.",
    "The fishermen mended their nets while the sea was rough.",
    "A white horse stood alone in the field beside the railway.",
    "The kitchen smelled of apples and of fresh coffee.",
    "The bus stopped near the post office to let the passengers out.",
    "Snow covered the roofs, and smoke rose from every chimney.",
    "The painter mixed a little yellow into the grey to make it warmer.",
    "They counted the bags twice and loaded them on the cart.",
    "The council met in spring to talk about the water supply.",
    "Under the stairs there was room for a bicycle and some boxes.",
    "A young couple moved into the apartment on the first floor.",
    "The shepherd knew each animal and called many of them by name.",
    "The lamp in the window could be seen from the other bank.",
    "He closed the shutters, locked the door and went up to bed.",
    "The path through the forest was narrow but easy to follow.",
    "On the last day of the holiday they climbed the hill again.",
    "The potter dried her bowls in the sun before she fired them.",
)
"""Neutral filler, written for this project: no digits, no names, nothing that a question asks for."""
