"""Segments that end with an anchor: their attention mask, and a cache that keeps only the anchors of closed segments.

A token sees its own segment so far and the anchors of all earlier ones. An anchor sees only its own segment. No later
token sees the rest of a closed segment, so the cache drops it. What a token may see follows from its *mark*, which
depends on the text alone. So a full forward pass, a prompt cut into pieces and decoding step by step all agree.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import Marked
from taut.ops.caches.base import Incoming, PositionedCache, gathered
from taut.ops.caches.quantized import RowStore, StoredLayer

ANCHOR, WHOLE, STEP = 1, 2, 4
"""A mark is the segment's number times STEP, plus ANCHOR for an anchor, plus WHOLE for a token of the source, which is
never dropped."""
FOREIGN = "this cache drops entries, so it serves only the model whose recipe made it"
NO_IDS = "anchors are found by their token ids: give input_ids, not inputs_embeds"


@dataclass(frozen=True)
class Segments(Marked):
    """The mask of AnSAN (Pang et al. 2024): a token sees its own segment.

    Tokens that are no anchors also see all earlier anchors and source tokens.
    """

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = query[..., :, None], key[..., None, :]
        same = query.div(STEP, rounding_mode="floor") == key.div(STEP, rounding_mode="floor")
        return same | ((key % STEP > 0) & (query & ANCHOR == 0))

    def sections(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        # An empty entry may have any segment's number. The running maximum keeps the numbers sorted for the search.
        numbers = key.div(STEP, rounding_mode="floor").cummax(1).values.contiguous()
        return torch.searchsorted(numbers, query.div(STEP, rounding_mode="floor").contiguous()), key % STEP > 0

    @property
    def repeats_from(self) -> int:
        return 0


@dataclass(frozen=True)
class Open:
    """The state of each row after some tokens: (B,) int64 number of its open segment, (B,) int64 tokens in it so far,
    (B,) bool whether its source is still open."""

    segment: Tensor
    length: Tensor
    source: Tensor

    def rows(self, index: Tensor) -> "Open":
        return Open(self.segment[index], self.length[index], self.source[index])


@dataclass(frozen=True)
class Anchoring:
    """Which tokens are anchors: those of ``ids``, and any at which a segment reaches ``longest`` tokens (0: no limit).

    The *source* is all tokens up to and with the first token of ``source_ends``. It is kept whole and has no anchors.
    """

    ids: tuple[int, ...] = ()
    longest: int = 0
    source_ends: tuple[int, ...] = ()

    def start(self, incoming: Incoming) -> Open:
        """Return the state of rows before their first tokens. Raises TautError when those have no ids."""
        if incoming.ids is None:
            raise TautError(NO_IDS)
        zeros = torch.zeros(len(incoming.ids), dtype=torch.long, device=incoming.device)
        return Open(zeros, zeros, torch.full_like(zeros, bool(self.source_ends), dtype=torch.bool))

    def marks(self, incoming: Incoming, before: Open) -> tuple[Tensor, Open]:
        """Return the (B, T) int64 marks of the new tokens, and the state of the rows after them.

        Raises TautError without ids.
        """
        ids, real = incoming.ids, incoming.real
        if ids is None:
            raise TautError(NO_IDS)
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        first = torch.zeros_like(real) if incoming.restarts is None else incoming.restarts.expand_as(real)
        restarted = first.long().cumsum(1)
        ends = _is_one_of(ids, self.source_ends) & real
        # How many ends of a source this sequence has had up to and with each token.
        ended = ends.long().cumsum(1)
        ended -= torch.where(first, ended - ends.long(), 0).cummax(1).values
        may = before.source[:, None] | ((restarted > 0) & bool(self.source_ends))
        in_source = may & (ended - ends.long() == 0) & real
        ends &= in_source
        counted = real & ~in_source
        named = _is_one_of(ids, self.ids) & counted
        place, open_since = counted.long().cumsum(1), -before.length[:, None]
        # The place of the last named anchor before each token, or of the last token of the previous packed sequence.
        last = torch.where(named, place, open_since).cummax(1).values
        last = torch.cat([open_since, last[:, :-1]], 1)
        last = torch.maximum(last, torch.where(first, place - counted.long(), open_since).cummax(1).values)
        full = counted & ((place - last) % self.longest == 0) if self.longest else torch.zeros_like(named)
        if self.ids and bool((full & ~named).any()):
            _warn_of_long_segments(self.longest)
        anchor = named | full
        closes = (anchor | ends).long()
        segment = before.segment[:, None] + closes.cumsum(1) - closes + restarted
        marks = segment * STEP + anchor.long() * ANCHOR + in_source.long() * WHOLE
        since = torch.where(anchor, place, open_since).cummax(1).values
        since = torch.maximum(since, torch.where(first, place - counted.long(), open_since).cummax(1).values)
        segments = before.segment + closes.sum(1) + restarted[:, -1]
        after = Open(segments, (place - since)[:, -1], may[:, -1] & (ended[:, -1] == 0))
        return marks, after


class AnchorLayer(StoredLayer):
    """The entries of one layer, oldest first."""

    def __init__(self, store: RowStore | None) -> None:
        super().__init__(store)
        self.ready = False
        self.seen = 0
        self.index: Tensor | None = None
        """The columns (B or 1, C) to keep once the new tokens are added; None keeps all."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add (B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        if not self.ready:
            raise TautError(FOREIGN)
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[2]
        self.retain(self.index)
        return keys, values

    def retain(self, index: Tensor | None) -> None:
        """Keep only these columns, or all if None."""
        if index is not None:
            self.keys, self.values = gathered(self.keys, index), gathered(self.values, index)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, not of entries: positions stay the true ones."""
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.ready, self.seen, self.index = False, 0, None


@dataclass(frozen=True)
class Held:
    """The contents of the columns, the same in every layer: (B, S) int64 positions (negative: empty) and marks."""

    positions: Tensor
    marks: Tensor

    def __len__(self) -> int:
        return self.positions.shape[1]

    def then(self, other: "Held") -> "Held":
        return Held(torch.cat([self.positions, other.positions], 1), torch.cat([self.marks, other.marks], 1))

    def columns(self, index: Tensor) -> "Held":
        """Return the columns ``index`` (B, C); an index of -1 gives an empty column."""
        taken = self.positions.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        return Held(taken, self.marks.gather(1, index.clamp(min=0)))

    def until(self, columns: int) -> "Held":
        return Held(self.positions[:, :columns], self.marks[:, :columns])

    def rows(self, index: Tensor) -> "Held":
        return Held(self.positions[index], self.marks[index])


class AnchorCache(PositionedCache):
    """Keeps the entries of the open segments, and before them only anchors and source tokens.

    Rows with fewer entries than others end in empty ones. Assisted decoding takes tokens back: pass the empty cache to
    ``generate``, and it keeps all unconfirmed entries until ``crop`` confirms them. Otherwise taking tokens back raises
    TautError.
    """

    def __init__(self, layers: int, anchoring: Anchoring, store: RowStore | None = None) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = [AnchorLayer(store) for _ in range(layers)], None
        self.anchoring = anchoring
        self.held: Held | None = None
        self.open: Open | None = None
        """The state of the rows before the unconfirmed tokens. Those are ``self.pending``, in the last columns."""
        self.pending: list[Incoming] = []
        self.recording = False

    def activate_past_recording(self) -> None:
        self.recording = True

    def begin(self, incoming: Incoming) -> None:
        device = incoming.device
        if self.held is None:
            self.open = self.anchoring.start(incoming)
            nothing = torch.zeros(len(incoming.ids), 0, dtype=torch.long, device=device)
            self.held = Held(nothing, nothing)
        self.starts = incoming.starts
        before = self.open
        for earlier in self.pending:
            _, before = self.anchoring.marks(earlier, before)
        marks, after = self.anchoring.marks(incoming, before)
        first = self.layers[0].seen - (0 if self.starts is None else self.starts.to(device)[:, None])
        positions = (first + torch.arange(incoming.queries, device=device)).expand(marks.shape)
        if incoming.real is not None:
            positions = positions.masked_fill(~incoming.real, -1)
        old = len(self.held)
        self.held = self.held.then(Held(positions, marks))
        self.key_positions, self.marks = self.held.positions, (marks, self.held.marks)
        index = None
        if self.recording:
            self.pending.append(incoming)
        else:
            index = self._reduced(after, old)
            self.open = after
        for layer in self.layers:
            layer.index, layer.ready = index, True

    def finish(self) -> None:
        self.key_positions = self.marks = None
        for layer in self.layers:
            layer.ready, layer.index = False, None

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys in this forward pass, and 0."""
        if self.held is None:
            raise TautError(FOREIGN)
        return len(self.held), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``abs(tokens_to_remove)`` tokens, confirm the others and drop what they closed.

        Raises TautError when fewer tokens are unconfirmed.
        """
        count = abs(tokens_to_remove)
        pending = sum(tokens.queries for tokens in self.pending)
        if count > pending:
            raise TautError(
                f"crop({tokens_to_remove}): the cache cannot take {count} tokens back, {pending} are unconfirmed. For "
                "assisted decoding, pass an empty cache of this recipe as past_key_values"
            )
        kept = pending - count
        after = self.open
        for tokens in self.pending:
            part = min(kept, tokens.queries)
            kept -= part
            if part:
                _, after = self.anchoring.marks(_first(tokens, part), after)
        self.held = self.held.until(len(self.held) - count)
        for layer in self.layers:
            layer.seen -= count
            if count:
                layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
        self.pending, self.open = [], after
        index = self._reduced(after, 0)
        for layer in self.layers:
            layer.retain(index)

    def state(self) -> dict[str, Tensor]:
        tensors = {"positions": self.held.positions, "marks": self.held.marks}
        return tensors | vars(self.open) | {"seen": torch.tensor(self.layers[0].seen)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.held = Held(state["positions"], state["marks"])
        self.open = Open(state["segment"], state["length"], state["source"])
        for layer in self.layers:
            layer.seen = int(state["seen"])

    def reset(self) -> None:
        super().reset()
        self.held = self.open = None
        self.pending = []

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.held is not None:
            rows = torch.arange(len(self.held.positions), device=self.held.positions.device)
            self._take(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def _take(self, rows: Tensor) -> None:
        """Select these rows in this order, as the layers do."""
        if self.held is not None:
            rows = rows.to(self.held.positions.device)
            self.held, self.open = self.held.rows(rows), self.open.rows(rows)
            self.pending = [
                replace(
                    tokens,
                    ids=tokens.ids[rows],
                    real=None if tokens.real is None else tokens.real[rows],
                    starts=None if tokens.starts is None else tokens.starts[rows],
                )
                for tokens in self.pending
            ]

    def _reduced(self, after: Open, old: int) -> Tensor | None:
        """Return the columns (B, C) that a later token may see, or None for all. The first ``old`` columns were already
        reduced."""
        marks, positions = self.held.marks, self.held.positions
        kind = marks % STEP
        if old and not bool((kind[:, old:] > 0).any()):
            return None
        here = marks.div(STEP, rounding_mode="floor") == after.segment[:, None]
        wanted = (positions >= 0) & ((kind > 0) | here)
        if bool(wanted.all()):
            return None
        counts = wanted.sum(1, keepdim=True)
        width = int(counts.max())
        index = (~wanted).long().argsort(dim=1, stable=True)[:, :width]
        empty = torch.arange(width, device=index.device) >= counts
        self.held = self.held.columns(index.masked_fill(empty, -1))
        return index


@cache
def _warn_of_long_segments(longest: int) -> None:
    """Warn once per process and bound."""
    warnings.warn(
        f"no anchor for {longest} tokens: the segment ends there, and so will later ones, without another warning. If "
        "this is common, choose other anchors or another bound (longest)",
        stacklevel=2,
    )


def _first(incoming: Incoming, queries: int) -> Incoming:
    """Return the first ``queries`` of these tokens."""
    real = None if incoming.real is None else incoming.real[:, :queries]
    return replace(incoming, queries=queries, ids=incoming.ids[:, :queries], real=real)


def _is_one_of(ids: Tensor, few: tuple[int, ...]) -> Tensor:
    if len(few) < 2:
        # Compared directly, without building a tensor: this runs at every decoding step.
        return ids == few[0] if few else torch.zeros_like(ids, dtype=torch.bool)
    return torch.isin(ids, torch.tensor(few, dtype=ids.dtype, device=ids.device))
