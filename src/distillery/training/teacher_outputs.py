"""Token log-probabilities and hidden states of a teacher, computed once and kept.

They lie in `.cache/signals/` under a key of all that decides them, as .npy files. All seeds and students that want the
same share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery import losses
from distillery.files import atomic_write
from distillery.fingerprint import code_digest
from distillery.models.label_model import Completion, LabelModel
from distillery.models.layers import output_head

MAX_ROWS_PER_BATCH = 16  # rows at a time, of which whole vocabularies are kept


@dataclass
class TeacherOutputs:
    """One teacher's token log-probabilities and hidden states for n rows, on the disk.

    start: [n + 1], where each row's supervised tokens begin. lengths: [completions], how many each has.
    tokens: [start[n], vocabulary] float16, log-probabilities at T = 1; or with `top_k` the k likeliest, `indices`
    naming them and `tail` holding the log of what is left. states: [n, layers, d] float32. maps: [all texts' tokens,
    layers] float32, row i from `at[i]` to `at[i + 1]`.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in ("start", "lengths", "tokens", "indices", "tail", "states", "maps", "at"):
            path = self.folder / f"{name}.npy"
            # mapped, not read: a vocabulary of 49,152 takes 96 KiB a supervised token
            setattr(self, name, np.load(path, mmap_mode="r") if path.exists() else None)

    def positions(self, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.arange(self.start[i], self.start[i + 1]) for i in rows])

    def logprobs(self, rows: Sequence[int]) -> Tensor:
        """[m, vocabulary] float32 at the supervised tokens of `rows`, row after row."""
        return torch.from_numpy(np.asarray(self.tokens[self.positions(rows)])).float()

    def top(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """values [m, k], indices [m, k], log_tail [m]: what :func:`losses.kl_top_k` takes."""
        at = self.positions(rows)
        values, tail = (torch.from_numpy(np.asarray(a[at])).float() for a in (self.tokens, self.tail))
        return values, torch.from_numpy(self.indices[at].astype(np.int64)), tail

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), layers, d] float32."""
        return torch.from_numpy(np.asarray(self.states[list(rows)]))

    def activity(self, rows: Sequence[int], width: int) -> Tensor:
        """[len(rows), layers, width] float32, 0 past each text's end."""
        out = np.zeros((len(rows), self.maps.shape[1], width), dtype=np.float32)
        for k, i in enumerate(rows):
            part = self.maps[self.at[i] : self.at[i + 1]]
            out[k, :, : len(part)] = part.T
        return torch.from_numpy(out)

    @property
    def bytes_a_token(self) -> float:
        """Bytes on the disk for each supervised token."""
        stored = [a.nbytes for a in (self.tokens, self.indices, self.tail) if a is not None]
        return sum(stored) / max(1, int(self.start[-1]))


@torch.no_grad()
def collect_teacher_outputs(
    folder: Path,
    open_model: Callable[[int], LabelModel],
    texts: Sequence[str],
    *,
    fold: Sequence[int],
    completions: Callable[[LabelModel], list[list[Completion]]] | None = None,
    top_k: int | None = None,
    layers: Sequence[int] = (),
    maps: bool = False,
) -> TeacherOutputs:
    """Ask a teacher about `texts` once and keep its answers in `folder`; read them from there if they are there.

    open_model: gives the teacher that may answer rows of a fold (-1: tuned on all gold rows). fold: [n].
    completions: the supervised tokens of every row, in that teacher's own tokens; None when none are wanted.
    layers: whose hidden states are wanted, 0 being the embeddings; maps: also where those layers are active.
    Raises UserError when the disk is full; nothing half-written stays.
    """
    if (folder / "done.json").exists():
        return TeacherOutputs(folder)
    with atomic_write(folder) as scratch:
        scratch.mkdir(parents=True)
        files: dict[str, np.ndarray] = {}
        for k in sorted(set(fold)):
            teacher = open_model(k)
            teacher.model.eval()
            ids = teacher.encode(texts)
            told = completions(teacher) if completions else None
            if not files:
                files = _allocate_arrays(scratch, teacher, ids, told, top_k, layers, maps)
            mine = sorted((i for i in range(len(texts)) if fold[i] == k), key=lambda i: len(ids[i]))
            batch_size = min(MAX_ROWS_PER_BATCH, teacher.batch_size) if told else teacher.batch_size
            for a in range(0, len(mine), batch_size):
                rows = mine[a : a + batch_size]
                asked = [told[i] for i in rows] if told else None
                out = teacher.forward(
                    [ids[i] for i in rows], asked, label_space=False, layers=layers, activation_maps=maps
                )
                if told:
                    at = np.concatenate([np.arange(files["start"][i], files["start"][i + 1]) for i in rows])
                    logprobs = out.completion_logits.log_softmax(-1)
                    if top_k:
                        values, indices, tail = losses.to_top_k(logprobs, top_k)
                        files["indices"][at] = indices.cpu().numpy()
                        files["tail"][at] = tail.clamp_min(-6e4).cpu().numpy()
                    else:
                        values = logprobs
                    files["tokens"][at] = values.cpu().numpy()  # log-probabilities down to -65,504
                if layers:
                    files["states"][rows] = out.hidden_states.cpu().numpy()
                if maps:
                    for j, i in enumerate(rows):
                        files["maps"][files["at"][i] : files["at"][i + 1]] = (
                            out.activation_maps[j, :, : len(ids[i])].T.cpu().numpy()
                        )
            del teacher
        for array in files.values():
            array.flush()
        (scratch / "done.json").write_text(json.dumps({"rows": len(texts), "layers": list(layers), "top_k": top_k}))
    return TeacherOutputs(folder)


def _allocate_arrays(
    folder: Path,
    teacher: LabelModel,
    ids: list[list[int]],
    told: list[list[Completion]] | None,
    top_k: int | None,
    layers: Sequence[int],
    maps: bool,
) -> dict[str, np.ndarray]:
    def array(name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape)

    def offsets(name: str, counts: list[int]) -> np.ndarray:
        out = array(name, (len(counts) + 1,), np.int64)
        out[:] = np.concatenate([[0], np.cumsum(counts)])
        return out

    out = {}
    if told:
        out["start"] = offsets("start", [sum(len(tokens) - skip for tokens, skip in row) for row in told])
        lengths = [len(tokens) - skip for row in told for tokens, skip in row]
        out["lengths"] = array("lengths", (len(lengths),), np.int64)
        out["lengths"][:] = lengths
        vocabulary = output_head(teacher.model).weight.shape[0]
        out["tokens"] = array("tokens", (int(out["start"][-1]), top_k or vocabulary), np.float16)
        if top_k:
            out["indices"] = array("indices", out["tokens"].shape, np.int32)
            out["tail"] = array("tail", out["tokens"].shape[:1], np.float32)
    if layers:
        out["states"] = array("states", (len(ids), len(layers), teacher.model.config.hidden_size), np.float32)
    if maps:
        out["at"] = offsets("at", [len(row) for row in ids])
        out["maps"] = array("maps", (int(out["at"][-1]), len(layers)), np.float32)
    return out


def teacher_outputs_key(*parts: object) -> str:
    """A name for signals: a hash of `parts` and of the code that computes them."""
    digest = hashlib.sha256(
        code_digest("losses", "models", "tasks", "training.teacher_models", "training.teacher_outputs").encode()
    )
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
