"""What we believe an engine's prefix cache holds: pieces of prompts, in the order in which it would give them up.

Engines with a prefix cache (vLLM, SGLang) evict what was used longest ago, and never what a running call uses. So we
believe the same: *pieces*, one for each message after all messages before it, are in use, or idle in the order of
their last use. A prefix that several workflows share is one piece and counted once. A workflow that counts on a piece
has a reference to it; references change nothing about what the engine evicts, they say what would be missed.

A piece is *owned* while it lies on the path of some workflow's newest call (``references``). An idle one without an
owner is *obsolete*: a later turn left it behind, or its workflow is over. A piece that is lost though it has an owner
is remembered, so that it is the same one when it is computed again.

Two things tell of losses: the size of the cache (``shrink``), and answers that found less than we believed (``end``).
No engine gives up a beginning before what comes after it, or if it
does, what comes after cannot be found: so with a node, all behind it are lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter

from orla_lg.core.cache.prefix.capacity import HitCheck
from orla_lg.core.cache.prefix.eviction import Eviction, EvictionBand, EvictionOrder, PrefixNode
from orla_lg.core.call import CHARS_PER_TOKEN, Ask

MAX_PIECES = 200_000
"""Known of an engine that does not say what it holds; the oldest are forgotten."""
LEARNING = 0.3
"""Weight of the newest answer in how many tokens a character makes."""

FILLED, TOKENS, COUNTED = attrgetter("filled"), attrgetter("tokens"), attrgetter("counted")
"""Of a node; a long prompt has many, and these are asked without a step of Python for each."""


@dataclass(eq=False, slots=True)
class CacheHandle:
    """A call's pieces while it is in flight."""

    prompt_owner: str
    """The workflow that got the answers that the prompt may repeat."""
    path: list[PrefixNode]
    """The nodes of the prompt, from the first message to the last."""
    answer: PrefixNode
    fresh: list[PrefixNode]
    """The nodes of the path that were not there before."""
    expected_tokens: float
    """So much of the prompt should be found in the cache."""
    enough_tokens: float
    """A cache of this size would not have given up any of that."""
    believed: list[float]
    """Of the first pieces, how many tokens of each should be found."""
    used: int
    """So many of the first pieces were in use already."""
    proven: int
    """So many of the first pieces were part of a prompt before: an answer may come back in another rendering."""
    tokens_per_char: float
    """By which the sizes of the others were estimated."""


@dataclass(eq=False)
class PrefixTree:
    """The pieces of one engine. ``check_integrity`` asserts what the parts promise."""

    tokens_per_char: float = 1 / CHARS_PER_TOKEN
    in_use_tokens: float = 0.0
    """Of calls in flight, with the answers that are expected."""
    wanted_tokens: float = 0.0
    """In use or claimed, whether it is still there or not."""
    flow_tokens: float = 0.0
    """All that ever went out of use."""
    eviction_order: EvictionOrder = field(default_factory=EvictionOrder)
    witness: HitCheck = field(default_factory=HitCheck)

    @property
    def pieces(self) -> dict[object, PrefixNode]:
        """Those alive, by their keys."""
        return self.eviction_order.pieces

    @property
    def idle_tokens(self) -> float:
        """What no call in flight uses."""
        return self.eviction_order.idle_tokens

    @property
    def tokens(self) -> float:
        """All that is believed to be there."""
        return self.in_use_tokens + self.eviction_order.idle_tokens

    # Looking

    def find(self, ask: Ask, prompt_owner: str = "") -> list[PrefixNode]:
        """Return the pieces of the longest beginning of a prompt that is known.

        An answer is known by its text only once a prompt repeated it. Before, it is taken to be what *prompt_owner*
        repeats: other workflows with the same prompt may have got another answer.
        """
        pieces, wanted, found = self.eviction_order.pieces, ask.pieces, list[PrefixNode]()
        known = len(wanted)
        while known and (piece := pieces.get(wanted[known - 1][0])) is None:
            known -= 1
        if known:  # and so all before it are there too
            while piece is not None:
                found.append(piece)
                piece = piece.parent
            found.reverse()
            if len(found) != known:
                found = self._in_step(ask)
        for index in range(len(found), len(wanted)):
            said = found[-1].answer_to(prompt_owner) if found and ask.is_answer(index) else None
            if said is None or not said.alive:
                break
            found.append(said)
        return found

    def _in_step(self, ask: Ask) -> list[PrefixNode]:
        """Return the known beginning of a prompt whose names are not chained, as no sound application's are."""
        found = list[PrefixNode]()
        for key, _ in ask.pieces:
            piece = self.pieces.get(key)
            if piece is None or piece.parent is not (found[-1] if found else None):
                break
            found.append(piece)
        return found

    def adds(self, ask: Ask, answer_tokens: float, prompt_owner: str = "") -> tuple[float, float]:
        """Return by how much ``in_use_tokens`` and ``wanted_tokens`` would grow if the call went now."""
        found = self.find(ask, prompt_owner)
        use = want = answer_tokens
        for piece in found:
            if not piece.users:
                use += piece.tokens
                want += 0.0 if piece.claims else piece.tokens
        index, parent = len(found), found[-1] if found else None
        while index < len(ask.pieces) and (parent := self._lost_before(ask, index, parent, prompt_owner)) is not None:
            use += parent.tokens
            want += 0.0 if parent.claims else parent.tokens
            index += 1
        new = self._estimate(ask, index)
        return use + new, want + new

    def tokens_of(self, ask: Ask, prompt_owner: str = "") -> float:
        """Return how long a prompt is: what is known of it as counted, the rest by its length."""
        found = self.find(ask, prompt_owner)
        return sum(piece.tokens for piece in found) + self._estimate(ask, len(found))

    def there_tokens(self, ask: Ask, prompt_owner: str = "") -> float:
        """Return how much of a prompt would be found, what others are prefilling included."""
        return sum(piece.there_tokens for piece in self.find(ask, prompt_owner))

    def _estimate(self, ask: Ask, start: int) -> float:
        return sum(chars for _, chars in ask.pieces[start:]) * self.tokens_per_char

    def _lost_before(self, ask: Ask, index: int, parent: PrefixNode | None, prompt_owner: str) -> PrefixNode | None:
        """Return the lost piece that a message was, if somebody still owns it; *parent* is that of the one before."""
        missed = self.eviction_order.missed
        if not missed or (index and parent is None):
            return None
        piece = missed.get(ask.pieces[index][0])
        said = None if parent is None else parent.answer_to(prompt_owner)
        if piece is None and said is not None and ask.is_answer(index):
            piece = missed.get(said.key)
        return piece if piece is not None and piece.parent is parent else None

    # Calls

    def begin(
        self, ask: Ask, answer_tokens: float, prompt_owner: str = "", found: list[PrefixNode] | None = None
    ) -> CacheHandle:
        """Take a call's prompt and expected answer into use; *found* is what ``find`` returns, if that was asked."""
        self.eviction_order.changes += 1
        path = self.find(ask, prompt_owner) if found is None else found
        known, used = len(path), 0
        believed = list(map(TOKENS, filter(FILLED, path)))
        proven = sum(map(COUNTED, path))
        while used < known and path[used].users:  # with a piece all before it are in use
            used += 1
        for index in range(known - 1, -1, -1):
            if path[index].key == ask.pieces[index][0]:
                break  # and so have all before it the names that the prompt has for them
            self._name(path[index], ask.pieces[index][0], prompt_owner)
        since_tokens = self._used_since(path[len(believed) - 1]) if believed else 0.0
        fresh: list[PrefixNode] = []
        parent, fresh_tokens = path[-1] if path else None, 0.0
        for index in range(known, len(ask.pieces)):
            parent = self._appear(ask, index, parent, ask.pieces[index][1] * self.tokens_per_char, prompt_owner)
            fresh.append(parent)
            path.append(parent)
        answer = PrefixNode(object(), parent, answer_tokens)
        self.eviction_order.live(answer)
        self._use((*path, answer))
        for piece in fresh:
            fresh_tokens += piece.tokens
        enough = min(
            self.in_use_tokens + self.eviction_order.idle_tokens, since_tokens + answer_tokens + fresh_tokens
        )
        return CacheHandle(
            prompt_owner, path, answer, fresh, sum(believed), enough, believed, used, proven, self.tokens_per_char
        )

    def _appear(
        self, ask: Ask, index: int, parent: PrefixNode | None, tokens: float, prompt_owner: str
    ) -> PrefixNode:
        """Return a message's piece, which is not there: one that was lost before, or a new one."""
        piece = self._lost_before(ask, index, parent, prompt_owner) if self.eviction_order.missed else None
        key: object = ask.pieces[index][0]
        if piece is None:
            if key in self.pieces:
                key = object()  # names that are not chained: it is another message's already
            piece = PrefixNode(key, parent, tokens)
            self.eviction_order.live(piece)
        else:
            piece.filled = False
            self.eviction_order.live(piece)
            self._name(piece, key, prompt_owner)
        return piece

    def _used_since(self, piece: PrefixNode) -> float:
        """Return how many tokens were used since a piece was, its own included; rather too many than too few."""
        return self.in_use_tokens + (0.0 if piece.users else self.flow_tokens - piece.idle_from)

    def _name(self, piece: PrefixNode, key: object, prompt_owner: str) -> None:
        """Know an answer by its place in a prompt from now on."""
        if piece.key is not key and piece.key != key and key not in self.pieces:
            del self.pieces[piece.key]
            self.pieces[key] = piece
            self.eviction_order.missed.pop(key, None)
            piece.key = key
            if (
                (parent := piece.parent) is not None
                and parent.said is not None
                and parent.said.get(prompt_owner) is piece
            ):
                parent.said[prompt_owner] = None

    def _use(self, pieces: Iterable[PrefixNode]) -> None:
        used = wanted = 0.0
        idle = list[PrefixNode]()
        for piece in pieces:
            if piece.users == 0:
                if piece.idle:
                    idle.append(piece)
                used += piece.tokens
                if not piece.claims:
                    wanted += piece.tokens
            piece.users += 1
        self.in_use_tokens += used
        self.wanted_tokens += wanted
        self.eviction_order.take(idle)

    def filled(self, handle: CacheHandle) -> None:
        """Note that a call's prompt is prefilled."""
        for piece in reversed(handle.path):
            if piece.filled:
                break  # and so are all before it
            piece.filled = True

    def end(
        self,
        handle: CacheHandle,
        prompt_tokens: int | None,
        answer_tokens: int | None,
        cached_tokens: int | None = None,
    ) -> None:
        """Give back what a call used; it is now what was used last. Token counts as the engine reported them.

        Where the engine found less than was believed, that had been evicted, and others with it; the call's own
        prompt is there again, since the call computed it.
        """
        self.eviction_order.changes += 1
        if prompt_tokens is not None:
            self._count(handle, prompt_tokens)
        if cached_tokens is not None and (not handle.path or handle.path[-1].alive):  # with the last one all are
            lost = self.witness.first_lost(
                handle.believed, cached_tokens, inf if prompt_tokens is None else prompt_tokens
            )
            if lost is not None:
                self._correct(handle, lost)
        answer = handle.answer
        if answer_tokens is not None:
            self._resize(answer, answer_tokens)
        answer.filled = True
        self.filled(handle)
        if handle.path:
            handle.path[-1].answered(handle.prompt_owner, answer)
        self._unuse(answer)

    def undo(self, handle: CacheHandle) -> None:
        """Give back what a call used that never reached the engine: what it would have added is not there."""
        self.eviction_order.changes += 1
        self._unuse(handle.answer)
        for piece in handle.answer.path():
            if piece is handle.answer or (not piece.users and not piece.filled):
                self.eviction_order.lose(piece)

    def _unuse(self, leaf: PrefixNode) -> None:
        """Let a call use what ends in *leaf* no more.

        The end first: an engine gives up the end of a prompt before its beginning.
        """
        unused = unwanted = 0.0
        idle, flow_tokens = list[PrefixNode](), self.flow_tokens
        piece: PrefixNode | None = leaf
        while piece is not None:
            piece.users -= 1
            if piece.users == 0:
                unused += piece.tokens
                if not piece.claims:
                    unwanted += piece.tokens
                piece.idle_from = flow_tokens
                flow_tokens += piece.tokens
                if piece.alive:
                    idle.append(piece)
            piece = piece.parent
        self.in_use_tokens -= unused
        self.wanted_tokens -= unwanted
        self.flow_tokens = flow_tokens
        self.eviction_order.put(idle)

    def _count(self, handle: CacheHandle, prompt_tokens: int) -> None:
        """Let the pieces of a prompt add up to what the engine counted; what was estimated gives way."""
        guessed, before, left = list[PrefixNode](), 0.0, float(prompt_tokens)
        for piece in handle.path:
            if piece.counted:
                left -= piece.tokens
            else:
                guessed.append(piece)
                before += piece.tokens
        if guessed and left > 0:
            if before > 0:
                # By the estimate it had: calls beside each other do not correct the same one once more each.
                seen = handle.tokens_per_char * min(left / before, 2.0)
                self.tokens_per_char += LEARNING * (seen - self.tokens_per_char)
            for piece in guessed:
                self._resize(piece, left * piece.tokens / before if before > 0 else left / len(guessed))
                piece.counted = True

    def _resize(self, piece: PrefixNode, tokens: float) -> None:
        assert piece.users, "only a call in flight shows the size of its pieces"
        self.in_use_tokens += tokens - piece.tokens
        self.wanted_tokens += tokens - piece.tokens
        piece.tokens = tokens

    # References

    def claim(self, piece: PrefixNode, until: PrefixNode | None = None) -> None:
        """Count on a piece and all before it, as far as *until*, which is counted on already."""
        each: PrefixNode | None = piece
        while each is not None and each is not until:
            if not (each.users or each.claims):
                self.wanted_tokens += each.tokens
            each.claims += 1
            each = each.parent

    def disclaim(self, piece: PrefixNode) -> None:
        """Count on them no more."""
        each: PrefixNode | None = piece
        while each is not None:
            each.claims -= 1
            if not (each.users or each.claims):
                self.wanted_tokens -= each.tokens
            each = each.parent

    # What the engine gave up

    def shrink(self, limit_tokens: float) -> float:
        """Believe that the engine gave up what it gives up first until what is left fits; returns its tokens."""
        eviction_order, in_use_tokens = self.eviction_order, self.in_use_tokens
        before = eviction_order.idle_tokens
        while in_use_tokens + eviction_order.idle_tokens > limit_tokens or len(eviction_order.pieces) > MAX_PIECES:
            piece = eviction_order.first()
            if piece is None:
                break
            eviction_order.lose(piece)
        return before - eviction_order.idle_tokens

    def _correct(self, handle: CacheHandle, lost: int) -> None:
        """Believe that what comes after a prompt's first lost piece is gone, and what was used before it was.

        That last only where it says so: the piece was idle, and lay where the engine gives up what was used longest
        ago. A loss of what was never part of a prompt may be a mere difference of an answer from its repetition.
        """
        eviction_order, first = self.eviction_order, handle.path[lost]
        for piece in handle.path[lost:]:
            for child in list(piece.children()):
                if not child.users:
                    eviction_order.lose(child)
        tells = eviction_order.order is Eviction.LRU and first.band is EvictionBand.USUAL
        if tells and handle.used <= lost < handle.proven:
            deepest = handle.path[len(handle.believed) - 1]
            handle.enough_tokens -= first.idle_from - deepest.idle_from  # it was used later, and yet is gone
            eviction_order.lose_older(first.idle_from)

    def clear(self) -> None:
        """Believe nothing any more: the engine came back empty. Calls in flight end as they will."""
        for piece in list(self.pieces.values()):
            if piece.alive:
                self.eviction_order.lose(piece)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        self.eviction_order.check_integrity()
        assert all(piece.users or piece.idle for piece in self.pieces.values())
        in_use = sum(piece.tokens for piece in self.pieces.values() if piece.users)
        assert self.in_use_tokens >= in_use - 1e-3 * (1 + in_use), (self.in_use_tokens, in_use)
        assert all(piece.claims <= piece.owners or not piece.owners for piece in self.pieces.values())
        for piece in self.pieces.values():
            if (parent := piece.parent) is not None:  # looks from the end of a path stop where these hold
                assert parent.alive and parent.owners >= piece.owners
                assert parent.users >= piece.users and parent.filled >= piece.filled
