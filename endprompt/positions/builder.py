"""Text to samples: draws the prompt, lets the scheme place the tokens, weighs them, and checks the result."""

from __future__ import annotations

import numpy as np

from endprompt.errors import UserError
from endprompt.positions.prompts import Prompt, PromptTokens
from endprompt.positions.randomness import Streams
from endprompt.positions.sample import Sample
from endprompt.positions.schemes import SCHEMES, Task
from endprompt.recipe.schema import Positions


class SampleBuilder:
    """Makes sample `index` from a piece of text: a pure function of (text, seed, index), the same in any process.

    positions: the recipe's section. target_length: L. prompts: the tokenised set; a scheme that appends no prompt (pose,
    cream, randpos, full) leaves it unread. seed: the recipe's, >= 0.

    Raises UserError when it is made, not at some later sample, for lengths, prompts or options that do not fit.
    """

    source_length: int
    """Tokens of text that a sample is made from. A scheme that skips text uses n of them; a scheme that appends a prompt
    of p tokens uses the first n - p."""

    def __init__(self, positions: Positions, target_length: int, prompts: PromptTokens, seed: int):
        self.positions, self.target_length, self.prompts, self.seed = positions, target_length, prompts, seed
        self.scheme = SCHEMES[positions.scheme]
        self.source_length = self.scheme.source_length(positions, target_length)
        self._check_lengths()
        drawable = prompts.prompts if self.scheme.appends_prompt else (None,)
        self._tasks = {_length(prompt): self._task(prompt) for prompt in drawable}  # all else of a task is the recipe's

    @property
    def one_layout(self) -> bool:
        """True where every sample has the same position_ids, so that one rotary table serves a whole run."""
        if not self.scheme.fixed:
            return False
        layouts = [self.scheme.place(task, Streams(self.seed, 0)).position_ids for task in self._tasks.values()]
        return all(np.array_equal(layout, layouts[0]) for layout in layouts)

    def draw_prompt(self, index: int) -> Prompt | None:
        """The prompt of sample `index`, the same under every scheme; None under a scheme that appends none."""
        return self.prompts.draw(Streams(self.seed, index)["prompt"]) if self.scheme.appends_prompt else None

    def __call__(self, tokens: np.ndarray, index: int) -> Sample:
        """Sample `index` made of `tokens`, int64 [source_length]. Raises ValueError for another shape or dtype."""
        if tokens.shape != (self.source_length,) or tokens.dtype != np.int64:
            raise ValueError(f"expected int64 [{self.source_length}], found {tokens.dtype} {list(tokens.shape)}")
        streams, prompt = Streams(self.seed, index), self.draw_prompt(index)
        task = self._tasks[_length(prompt)]
        placement = self.scheme.place(task, streams)
        self._check_positions(placement.position_ids)
        body = tokens[: task.body_length] if placement.text is None else tokens[placement.text]
        loss_weights = np.ones(task.physical_length, dtype=np.float32)
        if prompt is None:
            sample_tokens = body.copy()
        else:
            prompt_tokens, predictable = prompt.write(body, streams["quote"])
            sample_tokens = np.concatenate([body, prompt_tokens])
            loss_weights[task.body_length :] = np.where(predictable, self.positions.prompt_loss_weight, 0)
        loss_weights[0] = 0  # nothing predicts the first token
        return Sample(sample_tokens, placement.position_ids, loss_weights)

    def _check_lengths(self) -> None:
        positions, n, target = self.positions, self.positions.physical_length, self.target_length
        if n > target:
            raise UserError("positions.physical_length", f"{n} is above target_length {target}", "lower it")
        if positions.scheme == "full" and n != target:
            raise UserError("positions.physical_length", f"scheme full trains at target_length {target}, found {n}", f"set it to {target}")
        if self.scheme.appends_prompt and not self.prompts.prompts:
            raise UserError("positions.prompts", f"none is given, scheme {positions.scheme} appends one", "name one, EP_1 for instance")
        if self.scheme.appends_prompt and (positions.displaced_length or 0) >= n:
            raise UserError(
                "positions.displaced_length", f"{positions.displaced_length} leaves nothing in place of physical_length {n}", "lower it"
            )

    def _task(self, prompt: Prompt | None) -> Task:
        n, length = self.positions.physical_length, _length(prompt)
        where = f"positions.prompts: {prompt.name}" if prompt else "positions"
        if length > n - 1:
            raise UserError(where, f"its {length} tokens leave no body in physical_length {n}", "shorten it or raise physical_length")
        if prompt and prompt.span_length > n - length:
            raise UserError(
                where, f"quotes {prompt.span_length} tokens from a body of {n - length}", "lower span_length or raise physical_length"
            )
        displaced = (self.positions.displaced_length or length) if prompt else 0
        task = Task(n, self.target_length, length, displaced, self.source_length, self.positions)
        self.scheme.check(task)
        return task

    def _check_positions(self, position_ids: np.ndarray) -> None:
        """A scheme that breaks these would train on nonsense without any other sign; 10 microseconds for 8192 tokens."""
        n, target = self.positions.physical_length, self.target_length
        increasing = position_ids.shape == (n,) and bool(np.all(position_ids[1:] > position_ids[:-1]))
        if not increasing or position_ids[0] < 0 or position_ids[-1] >= target or position_ids.dtype != np.int64:
            raise RuntimeError(f"scheme {self.positions.scheme} placed {n} tokens badly: int64, increasing, in [0, {target}) is wanted")


def _length(prompt: Prompt | None) -> int:
    return prompt.length if prompt else 0
