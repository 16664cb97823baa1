"""How many texts are longer than a model reads."""

from __future__ import annotations

from collections.abc import Sequence

from distillery.models.label_model import LabelModel


def count_cut_texts(model: LabelModel, texts: Sequence[str]) -> dict[str, int]:
    """`rows`: the number of `texts`; `cut`: of those that lose their end; `tokens`: that the model reads.

    Of a generative model with the examples of its own prompt, not with those that single texts may have.
    """
    if model.arch == "classifier":
        tokens = model.windows.reach if model.windows else model.max_length
        encoded = model.tokenizer(list(texts), verbose=False)["input_ids"]
    else:
        tokens = model.max_length
        encoded = [model.prompt_ids(text) for text in texts]
    return {"rows": len(texts), "cut": sum(len(ids) > tokens for ids in encoded), "tokens": tokens}
