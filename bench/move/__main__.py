"""What a moved workflow's next call waits for, on two real llama.cpp servers that save slots into one folder.

make bench-move                               eight rounds, some three minutes; run it alone
python -m bench.move --rounds 2 --tokens 300  a first look

stays     not moved: its slot has all
restored  moved, and both backends name the same slot_folder
warmed    moved without that: its last prompt is prefilled ahead, --wait seconds before the call comes
cold      moved without either
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from bench.lib.command import ended, parser, tell, usual
from bench.lib.figures import Column, Rounds, rotated
from bench.lib.flags import amount, count
from orla_lg import Backend, Orla, Record
from orla_lg_llamacpp.model import ensure_model
from orla_lg_sim.text import prose

STAYS, RESTORED, WARMED, COLD = "stays", "restored", "warmed", "cold"
ARMS = (STAYS, RESTORED, WARMED, COLD)
SERVE = """
import sys
from pathlib import Path
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
settings = EngineSettings(slots=2, context_tokens=int(sys.argv[1]), threads=1, save_dir=Path(sys.argv[2]))
with EmbeddedEngine(settings) as engine:
    print(engine.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def two_engines(context_tokens: int) -> Iterator[tuple[str, str]]:
    """Run two servers, each in a process of its own, that save into one folder."""
    ensure_model()
    with ExitStack() as stack:
        folder, urls = stack.enter_context(tempfile.TemporaryDirectory()), list[str]()
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(context_tokens), folder], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            urls.append(process.stdout.readline().strip())
        yield urls[0], urls[1]


@dataclass(frozen=True)
class Turn:
    """One arm in one round."""

    arm: str
    seed: int
    record: Record
    """Of the second call."""

    @property
    def ttft_ms(self) -> float:
        """To its first token, the restore included."""
        return 1000 * (self.record.ttft_s or 0.0)


def turn(arm: str, urls: Sequence[str], seed: int, tokens: int, wait_s: float) -> Turn:
    """Let a thread call, be moved, and call again."""
    dice = Random(f"{arm} {seed}")
    text = "".join(prose(dice, tokens))
    folder = "shared" if arm == RESTORED else ""
    backends = [
        Backend(name, url, engine="llamacpp", slot_folder=folder)
        for name, url in zip(("old", "new"), urls, strict=True)
    ]
    model = ChatOpenAI(base_url=urls[0], model="smollm2", api_key="none", max_tokens=8, stream_usage=True)

    def say(state: MessagesState) -> dict[str, Any]:
        return {"messages": [message for message in [_streamed(model, state["messages"])] if message is not None]}

    def move(state: MessagesState) -> dict[str, Any]:
        if arm != STAYS:
            assert orla.move(None, "new")
        time.sleep(wait_s)
        return {"messages": [("user", "And then?")]}

    builder = StateGraph(MessagesState).add_node("one", say).add_node("tool", move).add_node("two", say)
    builder.add_edge(START, "one").add_edge("one", "tool").add_edge("tool", "two")
    with Orla(backends, mapper={"*": "old"}, warm_up=arm != COLD) as orla:
        orla.connect()
        orla.wrap(builder).invoke({"messages": [("user", text)]})
        return Turn(arm, seed, orla.records()[-1])


def _streamed(model: ChatOpenAI, messages: Any) -> Any:
    whole = None
    for chunk in model.stream(messages):
        whole = chunk if whole is None else whole + chunk
    return whole


COLUMNS = [
    Column("next call: TTFT, ms", lambda turn: turn.ttft_ms, ",.0f"),
    Column("of its prompt cached, tokens", lambda turn: float(turn.record.cached_tokens or 0), ",.0f"),
    Column("prompt, tokens", lambda turn: float(turn.record.prompt_tokens or 0), ",.0f"),
]


def main() -> int:
    options = parser("move", __doc__)
    options.add_argument("--tokens", type=count, default=800, metavar="N", help="of the prompt, about (800)")
    options.add_argument("--wait", type=amount, default=6.0, metavar="S", help="between the calls (6)")
    usual(options, rounds=8)
    args = options.parse_args()
    turns = []
    with two_engines(2048) as urls:
        for seed in range(args.rounds):
            for arm in rotated(ARMS, seed):
                tell(f"round {seed + 1}/{args.rounds}: {arm}")
                turns.append(turn(arm, urls, seed, args.tokens, args.wait))
    tell(f"{args.rounds} rounds", last=True)
    print("\n".join(Rounds(turns, ARMS).table("the workflow", COLUMNS)))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "nothing was written"))
