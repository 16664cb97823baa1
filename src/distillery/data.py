"""From a file of labelled texts to splits that do not leak into each other.

A source is read, cleaned, clustered (rows that are nearly the same text stay together), split by cluster and
stratified by label, audited, and written. All of it happens in memory; files appear only when all went well.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from distillery import tasks
from distillery.params import SPLITS, Source, Split, UserError, atomic
from distillery.tasks import Task

COLUMNS = ("id", "text", "label", "rationale", "group")  # of every split; extra columns of the source come after
OWN_SPLIT = "split of the hub"  # a column between reading and splitting
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
NEEDS_EVERY_LABEL = ("train", "validation", "test")
CELLS = 1 << 23  # similarities held in memory at a time (32 MiB)
SLACK = 1e-5  # float32 puts identical texts a little below 1
EXAMPLES = 10  # rows shown per finding of the audit


@dataclass(frozen=True)
class Raw:
    """Records as they stand in the file, and where each one stands."""

    name: str  # the source as the user wrote it
    unit: str  # "line" or "row"
    rows: list[dict[str, Any]]
    numbers: list[int]  # of the line or row, from 1
    blank: int = 0  # empty lines that were skipped
    labels: list[str] | None = None  # names of the label's integers, when a hub data set brings them
    splits: list[str] | None = None  # of each row, when a hub data set's own are kept

    def at(self, i: int) -> str:
        return f"{self.name}, {self.unit} {self.numbers[i]}"


@dataclass(frozen=True)
class Prepared:
    """A source ready to be written.

    rows: id, text, label, rationale (str or None), group, extra columns.  split, cluster: one entry per row;
    `cluster` counts near-duplicates alone, `group` unites them with the groups of the file.
    """

    rows: pd.DataFrame
    split: np.ndarray
    cluster: np.ndarray
    task: Task
    audit: dict[str, Any]


# ------------------------------------------------------------------------------------------------- reading


def load(spec: Source, base: Path) -> Raw:
    """The records of a source; file paths are relative to `base`.

    Raises UserError with the file and the line or row when the file is missing, empty, of another kind,
    not UTF-8 or malformed, or when a hub data set cannot be reached.
    """
    if not spec.source.startswith("hub:"):
        return load_file(spec.source, base)
    raw = _hub(spec)
    if not raw.rows:
        raise UserError(f"{spec.source}: empty, there are no rows in it")
    return raw


def load_file(name: str, base: Path) -> Raw:
    """The records of the file `name`, a path relative to `base`. Raises UserError as :func:`load`."""
    path = base / name
    readers: dict[str, Callable[[str, bytes], Raw]] = {
        ".jsonl": _jsonl,
        ".csv": lambda name, content: _table(name, content, ","),
        ".tsv": lambda name, content: _table(name, content, "\t"),
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{name}: cannot read `{path.suffix or 'a name without suffix'}`; "
            f"allowed: {', '.join(SUFFIXES)}, or hub:owner/name[@revision]"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    raw = reader(name, content)
    if not raw.rows:
        raise UserError(f"{name}: empty, there are no rows in it")
    return raw


def _decode(name: str, content: bytes) -> str:
    mark = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    try:
        return content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + mark
        line = content.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[offset]:02x} at offset {offset} is not UTF-8; save the file as UTF-8"
        ) from None


def _jsonl(name: str, content: bytes) -> Raw:
    rows, numbers, blank = [], [], 0
    # Only "\n" ends a line: str.splitlines would also cut at characters that may stand inside a JSON string.
    lines = _decode(name, content).removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank += 1
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{name}, line {number}: not valid JSON: a number too long or brackets too deep") from None
        if not isinstance(row, dict):
            raise UserError(f'{name}, line {number}: must be a JSON object like {{"text": …}}, not {_kind(row)}')
        if "\\u" in line:
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(f"{name}, line {number}: half of a surrogate pair (\\ud800 to \\udfff)") from None
        rows.append(row)
        numbers.append(number)
    return Raw(name, "line", rows, numbers, blank)


def _table(name: str, content: bytes, delimiter: str) -> Raw:
    reader = csv.reader(io.StringIO(_decode(name, content), newline=""), delimiter=delimiter, strict=True)
    header, rows, numbers, blank, start = None, [], [], 0, 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{name}, line {start}: not a valid table: {error} (is a quote left open?)") from None
        number, start = start, reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            blank += 1
        elif header is None:
            header = [cell.strip() for cell in cells]
            twice = [column for column, n in Counter(header).items() if n > 1]
            if twice:
                raise UserError(f"{name}, line {number}: the column `{twice[0]}` is there twice")
        elif len(cells) != len(header):
            raise UserError(f"{name}, line {number}: {len(cells)} fields, but the header has {len(header)}")
        else:
            rows.append(dict(zip(header, cells, strict=True)))
            numbers.append(number)
    return Raw(name, "line", rows, numbers, blank)


def _parquet(name: str, content: bytes) -> Raw:
    if not content:
        return Raw(name, "row", [], [])
    try:
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (pa.ArrowException, OSError):
        raise UserError(f"{name}: not a Parquet file, or damaged") from None
    return Raw(name, "row", rows, list(range(1, len(rows) + 1)))


def _hub(spec: Source) -> Raw:
    source = spec.source
    found = re.fullmatch(r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w./-]+))?", source)
    if not found:
        raise UserError(f"{source}: not a hub data set; write hub:owner/name or hub:owner/name@revision")
    own = {part: name for part, name in (spec.hub_splits.model_dump() if spec.hub_splits else {}).items() if name}
    import datasets  # slow to import, and only needed here

    chatter = [logging.getLogger(n) for n in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in chatter]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in chatter:  # its retries and hints would bury the one line that matters
            logger.setLevel(logging.CRITICAL)
        parts = [
            datasets.load_dataset(found[1], spec.hub_config, revision=found[2], split=split)
            for split in own.values() or [spec.hub_split]
        ]
    except OSError as error:  # the library tells no network, offline mode, unknown and gated apart in prose only
        unreachable = "no network (or HF_HUB_OFFLINE is set), unknown data set or revision, or no right to read it"
        raise UserError(f"{source}: {error.strerror or unreachable}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: cannot be read: {reason[:300]}") from None
    finally:
        for logger, level in zip(chatter, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
    names = getattr(parts[0].features.get(spec.columns.label), "names", None)
    rows = [row for part in parts for row in part.to_list()]
    splits = [name for name, part in zip(own, parts, strict=True) for _ in range(len(part))] if own else None
    return Raw(source, "row", rows, list(range(1, len(rows) + 1)), labels=names, splits=splits)


# ------------------------------------------------------------------------------------------------ cleaning


def clean(text: str) -> str:
    """`text` in Unicode NFC, with every run of white space folded into one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _visible(text: str) -> bool:
    return any(character.isprintable() and character != " " for character in text)


def _name(value: Any) -> str | None:
    """A label, id or group as text: integers are spelt out, an empty one is None. TypeError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError
    return clean(str(value)) or None


def tidy(raw: Raw, spec: Source, task: Task) -> tuple[pd.DataFrame, list[tuple[int, str]], dict[str, Any]]:
    """Checked and cleaned rows, before any grouping.

    Returns the frame (id, text, label, rationale, group or None, extra columns); pairs (row, group) of the groups
    of dropped duplicates, which the row that stays also belongs to; and the counts of what was left out.
    Raises UserError naming the line or row and what is allowed.
    """
    there = list(dict.fromkeys(column for row in raw.rows for column in row))
    columns = spec.columns
    roles = ("text", "options", "label", "id", "group", "rationale")
    named = {role: getattr(columns, role) for role in roles if role != "options" or task.kind == "choice"}
    named = {role: [name] if isinstance(name, str) else name or [] for role, name in named.items()}
    for role, names in named.items():
        for column in names:
            if column not in there and (role in ("text", "options", "label") or role in columns.model_fields_set):
                shown = ", ".join(f"`{c}`" for c in there)
                raise UserError(f"{raw.name}: no column `{column}` for the {role}; there are: {shown}")
    mapped = {column for names in named.values() for column in names}
    # A second column called `label` beside the one that is used would bring labels into the pool.
    left_out = [column for column in there if column not in mapped and (column in COLUMNS or not column.strip())]
    if task.kind == "qa" and "answers" in there and "answers" not in mapped:
        left_out.append("answers")  # the accepted ones are called so below
    extras = [column for column in there if column not in mapped and column not in left_out]
    allowed = {clean(label): label for label in task.names}

    kept: dict[str, list[Any]] = {role: [] for role in COLUMNS}
    origin: list[int] = []  # of each kept row in raw.rows
    told: list[str | None] = []  # accepted answers
    first: dict[tuple[str, str | None], int] = {}  # (text, label or answers) -> kept row
    also: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for i, row in enumerate(raw.rows):
        values = {role: row.get(getattr(columns, role)) for role in COLUMNS if role != "text"}
        for column in (*named["text"], columns.rationale):
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{raw.at(i)}: `{column}` must be text, not {_kind(value)} ({value!r:.60})")
        text = clean(" ".join(row.get(column) or "" for column in named["text"]))
        if not _visible(text):
            raise UserError(f"{raw.at(i)}: `{'`, `'.join(named['text'])}` is empty; every row needs a text")
        if raw.labels and type(values["label"]) is int and 0 <= values["label"] < len(raw.labels):
            values["label"] = raw.labels[values["label"]]
        answers = None
        if task.kind == "qa" and columns.label is not None:
            answers = _answers(raw.at(i), columns.label, values["label"])
            values["label"] = "right"
        for role in ("label", "id", "group"):
            try:
                values[role] = _name(values[role])
            except TypeError:
                column, value = getattr(columns, role), values[role]
                raise UserError(
                    f"{raw.at(i)}: `{column}` must be text or a whole number, not {_kind(value)} ({value!r:.60})"
                ) from None
        if task.kind == "choice":
            text, values["label"] = _choice(raw.at(i), text, row, named["options"], values["label"], spec, task)
        if values["label"] not in allowed and columns.label is not None:
            what = f"unknown label {values['label']!r:.60}" if values["label"] else f"`{columns.label}` is empty"
            raise UserError(f"{raw.at(i)}: {what}; allowed: {', '.join(task.names)}")
        label = allowed.get(values["label"])
        same = (text, answers or label)
        if same in first:
            if values["group"]:
                also.append((first[same], values["group"]))
            continue
        identity = values["id"] if columns.id in there else f"r{raw.numbers[i]:06d}"
        if identity is None:
            raise UserError(f"{raw.at(i)}: `{columns.id}` is empty; every row needs an id of its own (or none has one)")
        if identity in seen:
            raise UserError(f"{raw.at(i)}: the id {identity!r:.60} is already that of {raw.unit} {seen[identity]}")
        seen[identity] = raw.numbers[i]
        first[same] = len(origin)
        origin.append(i)
        told.append(answers)
        rationale = clean(values["rationale"] or "") or None
        for role, value in zip(COLUMNS, (identity, text, label, rationale, values["group"]), strict=True):
            kept[role].append(value)
    frame = pd.DataFrame({role: pd.Series(values, dtype=object) for role, values in kept.items()})
    for column in extras:
        frame[column] = pd.Series(_plain([raw.rows[i].get(column) for i in origin]), dtype=object)
    if task.kind == "qa":
        frame["answers"] = pd.Series(told, dtype=object)
    if raw.splits:
        frame[OWN_SPLIT] = [raw.splits[i] for i in origin]
    counts = {
        "read": len(raw.rows),
        "blank": raw.blank,
        "duplicates": len(raw.rows) - len(frame),
        "columns_left_out": left_out,
    }
    return frame, also, counts


def _answers(at: str, column: str, value: Any) -> str:
    """The accepted answers in one text, each once: of one text, of a list, or of a `value` and its `aliases`."""
    if isinstance(value, dict):
        value = [value.get("value"), *(value.get("aliases") or [])]
    value = [value] if isinstance(value, str | int) else value
    try:
        found = [_name(one) for one in value or []]
    except TypeError:
        found = []
    if not found or None in found:
        raise UserError(f"{at}: `{column}` must be an answer or a list of accepted answers, not {value!r:.60}")
    return tasks.BETWEEN.join(dict.fromkeys(one.replace(tasks.BETWEEN, " / ") for one in found))


def _choice(
    at: str, text: str, row: dict[str, Any], columns: list[str], answer: str | None, spec: Source, task: Task
) -> tuple[str, str | None]:
    """The text with its options in an order of their own, and the label of the right one.

    The order follows from what is asked and offered alone, so that no option's place tells anything and the same
    question twice reads the same. Raises UserError when the options or the answer do not fit the task.
    """
    offered = row.get(columns[0]) if len(columns) == 1 else [row.get(column) for column in columns]
    shown = "`, `".join(columns)
    if not isinstance(offered, list) or not all(isinstance(option, str) and clean(option) for option in offered):
        raise UserError(f"{at}: `{shown}` must be a list of texts, none of them empty, not {offered!r:.60}")
    options = [clean(option) for option in offered]
    if spec.columns.first == "A" and all(re.match(rf"\(?{chr(65 + n)}\)", o) for n, o in enumerate(options)):
        options = [re.sub(r"^\(?[A-Z]\)\s*", "", option) for option in options]  # "A)21": the letter is said below
    if not 2 <= len(options) <= len(task.names):
        raise UserError(f"{at}: `{shown}` holds {len(options)} options; allowed: 2 to {len(task.names)}")
    seed = hashlib.sha256("\n".join([text, *sorted(options)]).encode()).digest()
    # equal options keep the order of the file among themselves
    order = np.random.default_rng(list(seed)).permutation(sorted(range(len(options)), key=lambda n: (options[n], n)))
    label = None
    if spec.columns.label is not None:
        called = [
            chr(65 + n) if spec.columns.first == "A" else str(spec.columns.first + n) for n in range(len(options))
        ]
        if answer not in called:
            what = f"unknown answer {answer!r:.60}" if answer else f"`{spec.columns.label}` is empty"
            raise UserError(f"{at}: {what}; allowed: {', '.join(called)}")
        label = task.names[int(np.flatnonzero(order == called.index(answer))[0])]
    return tasks.with_options(task, text, [options[n] for n in order]), label


def _plain(values: list[Any]) -> list[Any]:
    """A column that Parquet can hold: one plain type, else every value as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds <= {bool} or kinds <= {float}:
        return values
    if kinds <= {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return values
    return [None if v is None else json.dumps(v, ensure_ascii=False, sort_keys=True, default=str) for v in values]


# ---------------------------------------------------------------------------------------------- similarity


def mask_digits(text: str) -> str:
    """`text` with every number replaced by 0: "EUR 1,204.5 mn" and "EUR 87 mn" become the same."""
    return re.sub(r"\d+(?:[.,]\d+)*", "0", text)


def _vectors(texts: Sequence[str], masked: bool) -> csr_array:
    """Unit vectors [n, vocabulary] of 4-character counts within word boundaries, case folded.

    No inverse document frequency: the similarity of two texts must not depend on which others stand beside them.
    """
    counter = CountVectorizer(analyzer="char_wb", ngram_range=(4, 4), dtype=np.float32)
    return csr_array(normalize(counter.fit_transform(mask_digits(t) if masked else t for t in texts)))


def _blocks(left: csr_array, right: csr_array) -> Iterator[tuple[int, np.ndarray]]:
    """First row and cosine similarities [rows, n of right] of successive blocks of `left`; memory is bounded."""
    step = max(1, CELLS // max(1, right.shape[0]))
    transposed = right.T.tocsr()
    for start in range(0, left.shape[0], step):
        yield start, (left[start : start + step] @ transposed).toarray()


def nearest(left: Sequence[str], right: Sequence[str], masked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """For each text of `left`, its highest similarity to one of `right` (0 to 1) and that one's index.

    The similarity is the cosine of 4-character counts; with `masked` all numbers count as equal.
    With nothing to compare to, similarity 0 and index -1.
    """
    best, where = np.zeros(len(left)), np.full(len(left), -1)
    if len(left) and len(right):
        vectors = _vectors([*left, *right], masked)
        for start, block in _blocks(vectors[: len(left)], vectors[len(left) :]):
            where[start : start + len(block)] = block.argmax(axis=1)
            best[start : start + len(block)] = block.max(axis=1)
    return np.minimum(best, 1.0), where


def near_pairs(
    texts: Sequence[str], threshold: float, masked: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs i < j of `texts` with a similarity of at least `threshold`, in batches (i, j, similarity)."""
    vectors = _vectors(texts, masked)
    for start, block in _blocks(vectors, vectors):
        i, j = np.nonzero(block >= threshold - SLACK)
        similarity = np.minimum(block[i, j], 1.0)
        i = i + start
        yield i[i < j], j[i < j], similarity[i < j]


def unite(component: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """`component` (one number per row) after every row `i` has been united with its row `j`."""
    size = int(component.max()) + 1 if len(component) else 0
    graph = coo_array((np.ones(len(i), dtype=np.int8), (component[i], component[j])), shape=(size, size))
    return connected_components(graph, directed=False)[1][component]


def near_duplicates(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Cluster number per text: texts joined by a chain of pairs at least `threshold` alike, digits masked or not.

    Unmasked pairs count too, as long numbers in common can make two texts more alike than their words do.
    """
    component = np.arange(len(texts))
    for masked in (True, False):
        for i, j, _ in near_pairs(texts, threshold, masked):
            component = unite(component, i, j)
    return component


def _group_names(frame: pd.DataFrame, cluster: np.ndarray, also: list[tuple[int, str]]) -> list[str]:
    """One name per row, the same for rows that a user's group or a near-duplicate cluster joins.

    A group is called like the first user's group in it, or like its first row when there is none.
    """
    rows = [*((i, group) for i, group in enumerate(frame["group"]) if group is not None), *also]
    holder: dict[str, int] = {}
    pairs = [(i, holder.setdefault(group, i)) for i, group in rows]
    component = unite(cluster, np.array([i for i, _ in pairs], int), np.array([j for _, j in pairs], int))
    names: dict[int, str] = {}
    for i, group in rows:
        names.setdefault(component[i], group)
    taken = set(holder)
    for i, identity in enumerate(frame["id"]):
        if component[i] not in names:
            while identity in taken:  # a user's group may be called like somebody's id
                identity += "+"
            taken.add(identity)
            names[component[i]] = identity
    return [names[c] for c in component]


# ----------------------------------------------------------------------------------------------- splitting


def split_groups(
    groups: Sequence[str], labels: Sequence[str], names: Sequence[str], shares: Split, seed: int
) -> np.ndarray:
    """Assign whole groups to splits so that each split gets its share of the rows of every label.

    Every label of `names` gets at least one group in train, validation and test (those with a share above 0).
    Large groups go first, each to the split that then has the smallest part of its target for the group's labels,
    so that groups of every size are spread in proportion too. Deterministic in `seed`.
    Returns an array of split names, one per row. Raises UserError when a label has too few groups.
    """
    share = {split: getattr(shares, split) for split in SPLITS if getattr(shares, split) > 0}
    splits = list(share)
    needed = [splits.index(split) for split in NEEDS_EVERY_LABEL if split in share]
    group_of, _ = pd.factorize(np.asarray(groups, dtype=object))
    label_of = pd.Categorical(labels, categories=list(names)).codes
    counts = np.zeros((group_of.max() + 1, len(names)), dtype=int)
    np.add.at(counts, (group_of, label_of), 1)
    holders = (counts > 0).sum(axis=0)
    wanted = ", ".join(splits[s] for s in needed)
    for label, n in zip(names, holders, strict=True):
        if n < len(needed):
            raise UserError(
                f"label `{label}` has {n} group(s) of rows (rows that belong together count once), "
                f"too few to split: needs {len(needed)}, one each for {wanted}"
            )
    for attempt in range(50):
        rng = np.random.default_rng([seed, attempt])
        assigned = _assign(counts, np.array([share[s] for s in splits]), needed, rng)
        if assigned is not None:
            return np.array(splits, dtype=object)[assigned[group_of]]
    raise UserError(f"no split holds every label in each of {wanted}: the labels share too few groups; add rows")


def _assign(counts: np.ndarray, share: np.ndarray, needed: list[int], rng: np.random.Generator) -> np.ndarray | None:
    """Split index per group [groups], or None when this shuffle leaves a needed split without some label."""
    target = np.outer(share, counts.sum(axis=0))  # [splits, labels] rows
    held = np.zeros_like(target)
    assigned = np.full(len(counts), -1)
    shuffled = rng.permutation(len(counts))

    def put(group: int, split: int) -> None:
        assigned[group] = split
        held[split] += counts[group]

    for label in np.argsort((counts > 0).sum(axis=0), kind="stable"):  # the rarest first
        for split in needed:
            if not held[split, label]:
                free = [g for g in shuffled if assigned[g] < 0 and counts[g, label]]
                if not free:
                    return None
                put(min(free, key=lambda g: ((counts[g] > 0).sum(), counts[g].sum())), split)
    # Sainte-Laguë's rule for seats. Filling the emptiest split instead would hand all large groups to the largest
    # splits, and contrast pairs would be missing from the small ones.
    weight = counts / counts.sum(axis=0)
    for group in sorted((g for g in shuffled if assigned[g] < 0), key=lambda g: -counts[g].sum()):
        put(group, int(np.argmin(((held + counts[group] / 2) / target) @ weight[group])))
    return assigned


# ----------------------------------------------------------------------------------------------- the audit


def _show(rows: pd.DataFrame, split: np.ndarray, i: int) -> dict[str, str]:
    return {"id": rows["id"][i], "split": split[i], "label": rows["label"][i], "text": rows["text"][i]}


def _conflicts(rows: pd.DataFrame, split: np.ndarray, threshold: float) -> dict[str, Any]:
    """Near-duplicates with different labels: contrast pairs, or slips of the annotator."""
    label, text = rows["label"].to_numpy(), rows["text"].to_numpy()
    pairs, identical, worst = 0, 0, []
    for i, j, similarity in near_pairs(list(text), threshold):
        differs = label[i] != label[j]
        i, j, similarity = i[differs], j[differs], similarity[differs]
        pairs += len(i)
        identical += int((text[i] == text[j]).sum())
        top = np.argsort(-similarity.round(4), kind="stable")[:EXAMPLES]
        worst = sorted([*worst, *zip(-similarity[top].round(4), i[top], j[top], strict=True)])[:EXAMPLES]
    examples = [
        {"similarity": round(-float(s), 4), "rows": [_show(rows, split, int(i)), _show(rows, split, int(j))]}
        for s, i, j in worst
    ]
    return {"pairs": pairs, "identical_texts": identical, "examples": examples}


def _leaks(rows: pd.DataFrame, split: np.ndarray, threshold: float, masked: bool) -> dict[str, Any]:
    """Pairs of rows in different splits that are nearly the same text, and the nearest ones there are."""
    vectors = _vectors(list(rows["text"]), masked)
    code = pd.Categorical(split, categories=SPLITS).codes
    above = np.zeros((len(SPLITS), len(SPLITS)), dtype=int)
    best, where = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    for start, block in _blocks(vectors, vectors):
        mine = slice(start, start + len(block))
        block[code[mine, None] == code[None, :]] = 0
        where[mine], best[mine] = block.argmax(axis=1), block.max(axis=1)
        i, j = np.nonzero(block >= threshold - SLACK)
        np.add.at(above, (code[mine][i], code[j]), 1)
    best = np.minimum(best, 1.0).round(4)
    nearest_pairs = {(min(i, where[i]), max(i, where[i])): best[i] for i in np.argsort(-best, kind="stable")}
    worst = [
        {"similarity": float(s), "rows": [_show(rows, split, int(i)), _show(rows, split, int(j))]}
        for (i, j), s in list(nearest_pairs.items())[:EXAMPLES]
        if s > 0
    ]
    evaluated = best[np.isin(split, ("validation", "test"))]
    return {
        "pairs_above": int(above.sum()) // 2,  # each pair was seen from both ends
        "pairs_above_by_splits": {
            f"{SPLITS[a]}-{SPLITS[b]}": int(above[a, b]) for a in range(4) for b in range(a + 1, 4) if above[a, b]
        },
        "nearest": {
            "highest": float(best.max()),
            **{f"p{p}": round(float(np.percentile(evaluated, p)), 4) for p in (50, 90, 99) if len(evaluated)},
        },
        "worst": worst,
    }


def _few_shot(rows: pd.DataFrame, split: np.ndarray, task: Task, threshold: float) -> list[dict[str, Any]]:
    """Few-shot examples of the task file that are near-duplicates of a row, the nearest row of each split named."""
    shots = [clean(shot.text) for shot in task.few_shot]
    found = []
    for part in SPLITS:
        there = np.flatnonzero(split == part)
        texts = list(rows["text"].iloc[there])
        ways = [nearest(shots, texts, masked) for masked in (True, False)]
        for n, shot in enumerate(shots):
            best, where = max(((float(b[n]), int(w[n])) for b, w in ways), key=lambda way: way[0])
            if best >= threshold - SLACK:
                row = _show(rows, split, int(there[where]))
                found.append({"few_shot": n, "text": shot, "split": part, "similarity": round(best, 4), "row": row})
    return found


def _lengths(texts: pd.Series) -> dict[str, dict[str, float]]:
    out = {}
    for unit, values in (("words", texts.str.split().str.len()), ("characters", texts.str.len())):
        values = values.to_numpy(dtype=float)
        out[unit] = {
            "mean": round(float(values.mean()), 1),
            **{f"p{p}": round(float(np.percentile(values, p)), 1) for p in (5, 50, 95)},
            "max": float(values.max()),
        }
    return out


def _tell_the_label(rows: pd.DataFrame, task: Task) -> list[str]:
    """Extra columns that are the label under another name (an integer code, say)."""
    extras = [c for c in rows.columns if c not in COLUMNS]
    named = {c: rows[c].fillna("") if rows[c].isna().any() else rows[c] for c in extras}
    return [
        column
        for column, values in named.items()
        if values.nunique() <= len(task.names)
        and rows["label"].notna().all()
        and rows["label"].groupby(values).nunique().max() == 1
    ]


def _to_the_point(
    raw: Raw, rows: pd.DataFrame, also: list[tuple[int, str]], spec: Source
) -> tuple[pd.DataFrame, list[tuple[int, str]], dict[str, int]]:
    """The rows that `spec.filter` lets through, and how many each step took. Raises UserError when none are left."""
    wanted, counts = spec.filter, {}
    if wanted is None:
        return rows, also, counts
    stay = pd.Series(True, index=rows.index)
    if wanted.languages:
        if wanted.language not in rows:
            raise UserError(f"{raw.name}: no column `{wanted.language}` to filter languages by")
        stay &= rows[wanted.language].isin(wanted.languages)
        counts["other_language"] = int((~stay).sum())
    if wanted.keywords:
        words = re.compile("|".join(rf"\b{re.escape(word.casefold())}\b" for word in wanted.keywords))
        found = rows["text"].map(lambda text: len(set(words.findall(text.casefold()))))
        counts["without_keyword"] = int((stay & (found < wanted.least)).sum())
        stay &= found >= wanted.least
    if not stay.any():
        raise UserError(f"{raw.name}: the filter leaves no row: {counts}")
    kept = np.flatnonzero(stay)
    position = {int(old): new for new, old in enumerate(kept)}
    also = [(position[i], group) for i, group in also if i in position]
    return rows.iloc[kept].reset_index(drop=True), also, counts


def prepare(name: str, spec: Source, task: Task, base: Path) -> Prepared:
    """Read, clean, cluster, split and audit the source `name`; writes nothing.

    Deterministic in the file, the task and `spec`. Raises UserError (see :func:`load`, :func:`tidy` and
    :func:`split_groups`), with one line that names the file.
    """
    raw = load(spec, base)
    rows, also, counts = tidy(raw, spec, task)
    rows, also, unfit = _to_the_point(raw, rows, also, spec)
    before = len(rows)
    if spec.limit:
        units = [group if group is not None else (i,) for i, group in enumerate(rows["group"])]
        code, known = pd.factorize(pd.Series(units, dtype=object))
        chosen = np.random.default_rng([spec.seed, len(SPLITS)]).permutation(len(known))[: spec.limit]
        stay = np.flatnonzero(np.isin(code, chosen))
        position = {int(old): new for new, old in enumerate(stay)}
        also = [(position[i], group) for i, group in also if i in position]
        rows = rows.iloc[stay].reset_index(drop=True)
    own = rows.pop(OWN_SPLIT) if OWN_SPLIT in rows else None
    user_groups = rows["group"].copy()
    cluster = near_duplicates(list(rows["text"]), spec.near_duplicate)
    rows["group"] = pd.Series(_group_names(rows, cluster, also), dtype=object)
    # of a choice's labels those that are right somewhere: no row may have as many options as the task allows
    names = task.names if task.kind == "classification" else [n for n in task.names if (rows["label"] == n).any()]
    try:
        if own is not None:
            split = own.to_numpy(dtype=object)
        elif spec.split is None:
            split = np.full(len(rows), "pool", dtype=object)
        else:
            split = split_groups(rows["group"], rows["label"], names, spec.split, spec.seed)
    except UserError as error:
        raise UserError(f"{raw.name}: {error}") from None

    sizes = np.bincount(cluster)
    merged = rows["group"].groupby(rows["group"]).size()
    audit = {
        "name": name,
        "source": spec.source,
        "seed": spec.seed,
        "near_duplicate": spec.near_duplicate,
        "dropped": {
            "blank": counts["blank"],
            "duplicates": counts["duplicates"],
            "over_limit": before - len(rows),
            **unfit,
        },
        "columns_left_out": counts["columns_left_out"],
        "columns_left_out_of_pool": _tell_the_label(rows, task),
        "rows_read": counts["read"],
        "rows": len(rows),
        "groups": len(merged),
        "splits": {
            part: {
                "rows": int((split == part).sum()),
                "share": round(float((split == part).mean()), 4),
                "groups": int(rows["group"][split == part].nunique()),
                "groups_of_several_rows": int((rows["group"][split == part].value_counts() > 1).sum()),
                "labels": {label: int(((rows["label"] == label) & (split == part)).sum()) for label in task.names},
            }
            for part in SPLITS
        },
        "clusters": {
            "near_duplicate_clusters": int((sizes > 1).sum()),
            "rows_in_them": int(sizes[sizes > 1].sum()),
            "largest_cluster": int(sizes.max()),
            "groups_in_the_file": int(user_groups.nunique()),
            "groups_of_several_rows": int((merged > 1).sum()),
            "largest_group": int(merged.max()),
        },
        "label_conflicts": _conflicts(rows, split, spec.near_duplicate),
        "across_splits": {
            "digits_masked": _leaks(rows, split, spec.near_duplicate, masked=True),
            "as_written": _leaks(rows, split, spec.near_duplicate, masked=False),
        },
        "few_shot_near_duplicates": _few_shot(rows, split, task, spec.near_duplicate),
        "lengths": {
            "all": _lengths(rows["text"]),
            "by_label": {
                n: _lengths(rows["text"][rows["label"] == n]) for n in task.names if (rows["label"] == n).any()
            },
        },
    }
    return Prepared(rows, split, cluster, task, audit)


# ---------------------------------------------------------------------------------------- writing, reading


def _write_parquet(frame: pd.DataFrame, schema: pa.Schema, path: Path) -> None:
    table = pa.table({column: frame[column].tolist() for column in frame}, pa.schema([schema.field(c) for c in frame]))
    with open(path, "wb") as file:
        pq.write_table(table, file)


def write(prepared: Prepared, folder: Path) -> None:
    """Write the splits, `pool_labels.parquet`, `task.json` and `audit.json` into `folder`, replacing it as a whole.

    The pool carries no label, no rationale and no column that tells the label.
    Raises UserError when the disk is full; `folder` is then as it was before.
    """
    rows, split = prepared.rows, prepared.split
    gold = ["label", "rationale", *(["answers"] if "answers" in rows and prepared.task.kind == "qa" else [])]
    hidden = [*gold, *prepared.audit["columns_left_out_of_pool"]]
    # Types come from the whole column: a split may be empty, or without any rationale.
    types = {c: pa.string() if c in (*COLUMNS, "answers") else pa.array(rows[c].tolist()).type for c in rows}
    schema = pa.schema(list(types.items()))
    with atomic(folder) as new:
        new.mkdir()
        for part in SPLITS:
            frame = rows[split == part]
            _write_parquet(frame.drop(columns=hidden) if part == "pool" else frame, schema, new / f"{part}.parquet")
        _write_parquet(rows.loc[split == "pool", ["id", *gold]], schema, new / "pool_labels.parquet")
        # The order of the labels is the order of probability vectors: keys stay as they are.
        task = json.dumps(prepared.task.model_dump(), ensure_ascii=False, indent=2)
        (new / "task.json").write_text(task + "\n", encoding="utf-8")
        audit = json.dumps(prepared.audit, ensure_ascii=False, indent=2, sort_keys=True)
        (new / "audit.json").write_text(audit + "\n", encoding="utf-8")


def read(folder: Path, part: str) -> pd.DataFrame:
    """One written file: `part` is train, pool, validation, test or pool_labels. Missing values are None.

    Raises UserError when it has not been written yet.
    """
    path = folder / f"{part}.parquet"
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `dvc repro` first")
    frame = pq.read_table(path).to_pandas(strings_to_categorical=False)
    for column in frame.columns.intersection(COLUMNS):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
    return frame


def read_task(folder: Path) -> Task:
    """The task a source was prepared with."""
    return Task.model_validate_json((folder / "task.json").read_text(encoding="utf-8"))
