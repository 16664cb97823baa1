"""Token log-probabilities and hidden states of a teacher, computed once and stored.

They lie in `.cache/signals/` as .npy files, under a key of everything that decides them. All seeds and students that
need the same outputs share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillery import losses
from distillery.files import atomic_write
from distillery.fingerprint import code_digest
from distillery.models.devices import to_array
from distillery.models.label_model import Completion, LabelModel, ModelOutput
from distillery.models.layers import output_head
from distillery.training.kept_tokens import (
    decode_logprobs,
    encode_logprobs,
    id_type,
    sample_rest,
    scaled_to_tail,
)
from distillery.training.keys import result_key
from distillery.training.processes import computing_processes, from_first, process_rank, wait_for_all

MAX_ROWS_PER_BATCH = 16  # when distributions over the whole vocabulary are stored


ARRAYS = (
    "token_offsets",
    "completion_lengths",
    "token_logprobs",
    "token_indices",
    "tail_logprobs",
    "tail_entropies",
    "tail_samples",
    "exact_positions",
    "exact_logprobs",
    "states",
    "maps",
    "text_offsets",
)


@dataclass
class TeacherOutputs:
    """One teacher's token log-probabilities and hidden states for n rows, on the disk; None for what was not requested.

    token_offsets: [n + 1], the first supervised token of each row. completion_lengths: [completions], supervised tokens
    of each. token_logprobs: [tokens, vocabulary] float16, at T = 1; or with `top_k` [tokens, k], of the k likeliest
    tokens in one byte each, see :mod:`distillery.training.kept_tokens`, `token_indices` naming them and `tail_logprobs`
    [tokens] holding the logarithm of the remaining mass. exact_positions [labels]: the tokens of labels, whose
    log-probabilities are also in `exact_logprobs` [labels, k] float16, and are read from there. tail_samples: [tokens,
    samples] tokens drawn from the rest; tail_entropies: [tokens] its entropy.
    states: [n, layers, d] float32. maps: [tokens of all texts, layers] float32, row i from `text_offsets[i]` to
    `text_offsets[i + 1]`.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in ARRAYS:
            path = self.folder / f"{name}.npy"
            # mapped, not read: a vocabulary of 49,152 takes 96 KiB a supervised token
            setattr(self, name, np.load(path, mmap_mode="r") if path.exists() else None)

    def logprobs(self, rows: Sequence[int]) -> Tensor:
        """[m, vocabulary] float32 at the supervised tokens of `rows`, row after row."""
        return torch.from_numpy(np.asarray(self.token_logprobs[token_positions(self.token_offsets, rows)])).float()

    def top_k(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """values [m, k], indices [m, k], log_tail [m]: the arguments of :func:`losses.kl_top_k`."""
        tokens = token_positions(self.token_offsets, rows)
        log_tail = torch.from_numpy(np.asarray(self.tail_logprobs[tokens])).float()
        indices = torch.from_numpy(self.token_indices[tokens].astype(np.int64))
        stored = np.asarray(self.token_logprobs[tokens])
        if stored.dtype != np.uint8:
            return torch.from_numpy(stored).float(), indices, log_tail
        values = scaled_to_tail(torch.from_numpy(decode_logprobs(stored)), log_tail)
        is_exact, exact = _find(tokens, self.exact_positions)
        values[torch.from_numpy(is_exact)] = torch.from_numpy(self.exact_logprobs[exact]).float()
        return values, indices, log_tail

    def rest(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """samples [m, count], entropy [m] of the rest: the further arguments of :func:`losses.kl_sampled_rest`."""
        tokens = token_positions(self.token_offsets, rows)
        samples = torch.from_numpy(self.tail_samples[tokens].astype(np.int64))
        return samples, torch.from_numpy(np.asarray(self.tail_entropies[tokens])).float()

    def hidden_states(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), layers, d] float32."""
        return torch.from_numpy(np.asarray(self.states[list(rows)]))

    def activation_maps(self, rows: Sequence[int], width: int) -> Tensor:
        """[len(rows), layers, width] float32, 0 past each text's end."""
        padded = np.zeros((len(rows), self.maps.shape[1], width), dtype=np.float32)
        for k, i in enumerate(rows):
            row = self.maps[self.text_offsets[i] : self.text_offsets[i + 1]]
            padded[k, :, : len(row)] = row.T
        return torch.from_numpy(padded)

    @property
    def text_lengths(self) -> list[int]:
        """[n]: tokens of each text; of outputs with activation maps."""
        return np.diff(self.text_offsets).tolist()

    @property
    def bytes_a_token(self) -> float:
        """Bytes on the disk for each supervised token."""
        names = [name for name in ARRAYS if name.startswith(("token_l", "token_i", "tail_", "exact_"))]
        stored = [array.nbytes for name in names if (array := getattr(self, name)) is not None]
        return sum(stored) / max(1, int(self.token_offsets[-1]))

    @property
    def mean_tail(self) -> float:
        """The probability mass outside the kept tokens, mean over the supervised tokens; of outputs with `top_k`."""
        return float(np.exp(np.asarray(self.tail_logprobs, dtype=np.float64)).mean())


def token_positions(offsets: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """[m]: the supervised tokens of `rows`, row after row, as positions among those of all rows."""
    return np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in rows])


@torch.no_grad()
def collect_teacher_outputs(
    folder: Path,
    open_model: Callable[[int], LabelModel],
    texts: Sequence[str],
    *,
    fold: Sequence[int],
    completions: Callable[[LabelModel], list[list[Completion]]] | None = None,
    top_k: int | None = None,
    tail_samples: int = 0,
    has_labels: bool = True,
    layers: Sequence[int] = (),
    maps: bool = False,
) -> TeacherOutputs:
    """Run a teacher over `texts` once and store its outputs in `folder`; read them from there if they exist.

    open_model: returns the teacher's model for rows of a fold (-1: the one tuned on all gold rows). fold: [n].
    completions: the supervised tokens of every row, in the tokens of the given model; None when none are needed.
    top_k: how many tokens are kept at each; tail_samples: how many are drawn from the rest. has_labels: whether the
    first completion of a row is its label, whose log-probabilities are kept in two bytes.
    layers: of which hidden states are stored, 0 being the embeddings; maps: whether their activation maps are, too.
    Processes that train together share the batches. Raises UserError when the disk is full; nothing half-written stays.
    """
    if from_first((folder / "done.json").exists):
        return TeacherOutputs(folder)
    with _folder_of_all(folder) as scratch:
        arrays: dict[str, np.ndarray] = {}
        computes = process_rank() < computing_processes()
        if not computes:
            wait_for_all()  # the others do in `_arrays_of_all`
        for k in sorted(set(fold)) if computes else ():
            teacher = open_model(k)
            teacher.model.eval()
            ids = teacher.encode(texts)
            supervised = completions(teacher) if completions else None
            if not arrays:
                packing = (top_k, tail_samples, has_labels) if top_k else None
                arrays = _arrays_of_all(scratch, teacher, ids, supervised, layers, maps, packing)
            members = sorted((i for i in range(len(texts)) if fold[i] == k), key=lambda i: len(ids[i]))
            batch_size = min(MAX_ROWS_PER_BATCH, teacher.batch_size) if supervised else teacher.batch_size
            starts = range(0, len(members), batch_size)
            for a in starts[process_rank() :: computing_processes()]:
                rows = members[a : a + batch_size]
                batch = [supervised[i] for i in rows] if supervised else None
                options = {"label_space": False, "layers": layers, "activation_maps": maps}
                _store_outputs(arrays, rows, teacher.forward([ids[i] for i in rows], batch, **options), top_k)
            del teacher
        for array in arrays.values():
            array.flush()
        wait_for_all()
        if process_rank() == 0:
            record = {"rows": len(texts), "layers": list(layers), "top_k": top_k}
            (scratch / "done.json").write_text(json.dumps(record))
    wait_for_all()
    return TeacherOutputs(folder)


@contextmanager
def _folder_of_all(folder: Path) -> Iterator[Path]:
    """:func:`atomic_write` of `folder` by the first process; the others get the path of its temporary folder."""
    if process_rank():
        yield from_first(lambda: Path())
        return
    with atomic_write(folder) as scratch:
        scratch.mkdir(parents=True)
        yield from_first(lambda: scratch)


def _arrays_of_all(folder: Path, *settings: Any) -> dict[str, np.ndarray]:
    """The arrays that :func:`_allocate_arrays` makes in the first process, opened for writing in all of them."""
    arrays = _allocate_arrays(folder, *settings) if process_rank() == 0 else {}
    wait_for_all()
    return arrays or {path.stem: np.load(path, mmap_mode="r+") for path in folder.glob("*.npy")}


def _store_outputs(arrays: dict[str, np.ndarray], rows: list[int], output: ModelOutput, top_k: int | None) -> None:
    """Write the `output` of a teacher for `rows` into the arrays that were allocated."""
    if "token_logprobs" in arrays:
        tokens = token_positions(arrays["token_offsets"], rows)
        logprobs = output.completion_logits.log_softmax(-1)
        if top_k:
            _store_top_k(arrays, tokens, logprobs, top_k)
        else:
            arrays["token_logprobs"][tokens] = to_array(logprobs)  # float16: down to -65,504
    if "states" in arrays:
        arrays["states"][rows] = to_array(output.hidden_states)
    if "maps" in arrays:
        for j, i in enumerate(rows):
            start, end = arrays["text_offsets"][i : i + 2]
            arrays["maps"][start:end] = to_array(output.activation_maps[j, :, : end - start].T)


def _find(tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `tokens` are among the ascending `positions`, and where these are there."""
    at = np.searchsorted(positions, tokens)
    is_found = at < len(positions)
    is_found[is_found] = positions[at[is_found]] == tokens[is_found]
    return is_found, at[is_found]


def _store_top_k(arrays: dict[str, np.ndarray], tokens: np.ndarray, logprobs: Tensor, top_k: int) -> None:
    """Write the distributions `logprobs` [m, vocabulary] at the positions `tokens` [m] in their packed form."""
    values, indices, log_tail = losses.to_top_k(logprobs, top_k)
    arrays["token_indices"][tokens] = to_array(indices)
    arrays["tail_logprobs"][tokens] = to_array(log_tail.clamp_min(-6e4))
    arrays["token_logprobs"][tokens] = encode_logprobs(to_array(values))
    is_exact, exact = _find(tokens, arrays["exact_positions"])
    arrays["exact_logprobs"][exact] = to_array(values)[is_exact].clip(min=-6e4)
    if "tail_samples" in arrays:
        count = arrays["tail_samples"].shape[1]
        samples, entropies = sample_rest(logprobs, indices, count, seed=int(tokens[0]))
        arrays["tail_samples"][tokens] = to_array(samples)
        arrays["tail_entropies"][tokens] = to_array(entropies)


def _allocate_top_k(
    arrays: dict[str, np.ndarray],
    folder: Path,
    completions: list[list[Completion]],
    vocabulary: int,
    top_k: int,
    tail_samples: int,
    has_labels: bool,
) -> None:
    """Add the empty arrays of packed distributions, and the positions of labels filled in."""
    tokens = int(arrays["token_offsets"][-1])
    exact: list[int] = []
    if has_labels:
        lengths = [len(row[0][0]) - row[0][1] if row else 0 for row in completions]
        for start, length in zip(arrays["token_offsets"], lengths, strict=False):
            exact += range(start, start + length)
    shapes = {
        "token_logprobs": ((tokens, top_k), np.uint8),
        "token_indices": ((tokens, top_k), id_type(vocabulary)),
        "tail_logprobs": ((tokens,), np.float32),
        "exact_positions": ((len(exact),), np.int64),
        "exact_logprobs": ((len(exact), top_k), np.float16),
    }
    if tail_samples:
        shapes["tail_samples"] = ((tokens, tail_samples), id_type(vocabulary))
        shapes["tail_entropies"] = ((tokens,), np.float16)
    for name, (shape, kind) in shapes.items():
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape)
    arrays["exact_positions"][:] = exact


def _allocate_arrays(
    folder: Path,
    teacher: LabelModel,
    ids: list[list[int]],
    completions: list[list[Completion]] | None,
    layers: Sequence[int],
    maps: bool,
    packing: tuple[int, int, bool] | None,
) -> dict[str, np.ndarray]:
    """The empty arrays of :class:`TeacherOutputs` in `folder`, and the offsets and lengths filled in.

    packing: top_k, tail_samples and has_labels of :func:`collect_teacher_outputs`; None for whole distributions.
    """
    arrays: dict[str, np.ndarray] = {}

    def allocate(name: str, shape: tuple[int, ...], kind: type) -> None:
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape)

    def store(name: str, values: Sequence[int]) -> None:
        allocate(name, (len(values),), np.int64)
        arrays[name][:] = values

    if completions:
        lengths = [[len(tokens) - skip for tokens, skip in row] for row in completions]
        store("token_offsets", np.cumsum([0, *map(sum, lengths)]))
        store("completion_lengths", [length for row in lengths for length in row])
        vocabulary = output_head(teacher.model).weight.shape[0]
        if packing:
            _allocate_top_k(arrays, folder, completions, vocabulary, *packing)
        else:
            allocate("token_logprobs", (int(arrays["token_offsets"][-1]), vocabulary), np.float16)
    if layers:
        allocate("states", (len(ids), len(layers), teacher.model.config.hidden_size), np.float32)
    if maps:
        store("text_offsets", np.cumsum([0, *map(len, ids)]))
        allocate("maps", (int(arrays["text_offsets"][-1]), len(layers)), np.float32)
    return arrays


def teacher_outputs_key(*parts: object) -> str:
    """A name for the outputs of a teacher: a hash of `parts` and of the code and libraries that compute them."""
    modules = ("completions", "keys", "kept_tokens", "teacher_models", "teacher_outputs")
    names = [f"training.{module}" for module in modules]
    return result_key(code_digest("losses", "models", "tasks", *names), *parts)
