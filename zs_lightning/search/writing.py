"""A language model in memory that is asked many things at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from zs_lightning.generation import Generated, Generator, Request, Sampling, StopTags
from zs_lightning.models.encoding import TextEncoder
from zs_lightning.models.vocabulary import end_ids


class ModelWriter:
    """Asks a language model, which is in memory already, in eval mode. It writes greedily.

    Args:
        slots: most answers that are written at the same time.
        max_length: most tokens of a prompt and its answer.
        stop: texts that end an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, slots: int, max_length: int, stop: Sequence[str] = ("\n",)) -> None:
        self.encoder = TextEncoder(tokenizer)
        self.stop = StopTags(tokenizer, stop)
        self.stop.end_ids = end_ids(tokenizer, model)
        self.model = model
        self.slots = slots
        self.max_length = max_length
        self.tokens = 0
        """Tokens that were written."""

    def prompt(self, template: str, fields: Mapping[str, str]) -> list[int]:
        """Ids of what is asked; the texts of the fields come from outside."""
        return self.encoder.prompt(template, fields, chat=True, thinking=False)

    def texts(self, prompts: Sequence[list[int]], most: int) -> list[str]:
        """What the model writes for each prompt, of at most so many tokens, without its end."""
        # Made anew, since another model may need the same memory in between.
        generator = Generator(self.model, self.slots, self.max_length)
        for number, ids in enumerate(prompts):
            generator.submit(
                Request(
                    key=str(number),
                    ids=ids,
                    max_new_tokens=most,
                    seed=0,
                    sampling=Sampling(temperature=0.0),
                    stop=self.stop,
                )
            )
        said: dict[str, Generated] = {}
        for generated in generator.run():
            said[generated.key] = generated
            self.tokens += len(generated.token_ids)
        written: list[str] = []
        for number in range(len(prompts)):
            ids = said[str(number)].token_ids
            # The end token is no word of the model.
            written.append(self.encoder.decode(ids[:-1] if ids[-1] in self.stop.end_ids else ids))
        return written
