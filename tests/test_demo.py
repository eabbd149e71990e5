"""The demo: its graph with models of every quality, its run with a real engine, its view without a terminal."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from orla_lg import Backend, CallEvent, Happening, Hints, OrlaError, cli, timeline
from orla_lg.demo import compare, graph, report
from orla_lg.demo import run as running
from orla_lg.demo.board import STAGES, Board
from orla_lg.demo.compare import ARMS, Figures
from orla_lg.demo.customers import customer_file
from orla_lg.demo.fallbacks import (
    Category,
    Classification,
    Email,
    best_rule,
    classified_by_rules,
    corrected,
    letter,
    phrases_of,
    presentable,
    template,
)
from orla_lg.demo.run import ArmResult, DemoResult, Plan, answer_all, priorities, run
from orla_lg.demo.stopwatch import TimedCall
from orla_lg.demo.tickets import pick, tickets
from orla_lg.demo.tools import read_policy_yaml, read_team_descriptions, rules_in, teams_in

Answer = Callable[[dict[str, Any]], tuple[str, str]]
"""From a request body to the content of the answer and its ``finish_reason``."""

BILLING = "My card was charged twice for the Lumo lamp. Please refund the second payment."
BURNT = "My Volta charger smells burnt and there is smoke when I plug it in. Is it dangerous?"


@contextmanager
def stub_engine(answer: Answer) -> Iterator[str]:
    """Speak the OpenAI wire on loopback with whatever *answer* says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not body:  # whether another wire is spoken here
                self.send_error(404)
                return
            content, reason = answer(body)
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for chunk in _chunks(content, reason):
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": [{"id": "stub", "object": "model"}]}')

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _chunks(content: str, reason: str) -> Iterator[dict[str, Any]]:
    top = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "stub"}
    usage = {
        "prompt_tokens": 90,
        "completion_tokens": 9,
        "total_tokens": 99,
        "prompt_tokens_details": {"cached_tokens": 40},
    }
    delta = {"role": "assistant", "content": content}
    yield {**top, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**top, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    yield {**top, "choices": [], "usage": usage}


def clever(body: dict[str, Any]) -> tuple[str, str]:
    """Answer as a good model would: from what the prompt says, within the schema."""
    schema = body["response_format"]["json_schema"]["schema"]["properties"]
    said = "\n".join(message["content"] for message in body["messages"])
    if "category" in schema:
        return classified_by_rules(body["messages"][-1]["content"]).model_dump_json(), "stop"
    if "rule" in schema:
        rules = rules_in(said[said.rindex("policy:") : said.rindex("\n\n")])
        return json.dumps({"rule": best_rule(rules, said.split("\n\n")[1])}), "stop"
    if "team" in schema:
        category = said.rstrip(":").split()[-1]
        return json.dumps({"team": teams_in(read_team_descriptions.invoke({}))[category]}), "stop"
    if "body" in schema:
        rule = next(rule for rule in _all_rules() if rule in body["messages"][-1]["content"])
        return json.dumps(
            {"subject": schema["subject"]["enum"][0], "body": f"Thank you. {rule}".replace("Thank you. ", "")}
        ), "stop"
    name, values = next(iter(schema.items()))
    return json.dumps({name: values.get("const", values.get("enum", [True])[0])}), "stop"


def _all_rules() -> list[str]:
    policies = [read_policy_yaml.invoke({"policy": category}) for category in Category.__args__]
    return [rule for policy in policies for rule in rules_in(policy).values()]


BAD: dict[str, Answer] = {
    "garbage": lambda body: ("the the the the the the", "stop"),
    "truncated": lambda body: ('{"category": "billing", "prod', "length"),
    "cut_without_saying": lambda body: ('{"category": "billing", "prod', "stop"),
    "wrong_enum": lambda body: (
        json.dumps({"category": "weather", "policy": "../../graph", "rule": "none", "team": "Nobody", "subject": 5}),
        "stop",
    ),
    "wrong_types": lambda body: (json.dumps(dict.fromkeys(("policy", "rule", "team", "body"), 7)), "stop"),
    "list": lambda body: ("[1, 2]", "stop"),
    "empty": lambda body: ("", "stop"),
    "looping_letter": lambda body: (
        json.dumps({"policy": "general", "subject": "x", "body": "We are glad to help. We are glad to help. " * 5}),
        "stop",
    ),
}  # fmt: skip


async def answered(url: str, ticket: str, outbox: Path) -> dict[str, Any]:
    scheduler = graph.support_graph(graph.chat_model(url, "stub"), graph.chat_model(url, "stub"), outbox).compile()
    return await scheduler.ainvoke({"ticket": ticket})


# The graph alone


@pytest.mark.parametrize("model", BAD)
@pytest.mark.parametrize("ticket", [BILLING, BURNT, "?", "Hi"])
async def test_a_bad_model_still_ends_in_a_sensible_letter(model: str, ticket: str, tmp_path: Path) -> None:
    with stub_engine(BAD[model]) as url:
        state = await answered(url, ticket, tmp_path / "outbox.jsonl")
    found = Classification.model_validate(state["classification"].model_dump())
    email = Email.model_validate(state["email"].model_dump())
    assert state["rule"] in _all_rules()
    assert state["rule"] in email.body, "the template says what the policy says"
    assert state["team"] == teams_in(read_team_descriptions.invoke({}))[found.category]
    assert ("a person in our" in email.body) == found.needs_escalation
    assert set(state["fallbacks"]) >= {"classify", "reply"}
    assert json.loads((tmp_path / "outbox.jsonl").read_text())["body"] == email.body


async def test_a_good_model_needs_no_fallback(tmp_path: Path) -> None:
    with stub_engine(clever) as url:
        for ticket in tickets():
            state = await answered(url, ticket, tmp_path / "outbox.jsonl")
            assert state["fallbacks"] == [], (ticket, state)
    assert len((tmp_path / "outbox.jsonl").read_text().splitlines()) == len(tickets())


async def test_classification_decides_policy_and_team(tmp_path: Path) -> None:
    with stub_engine(clever) as url:
        billing = await answered(url, BILLING, tmp_path / "outbox.jsonl")
        burnt = await answered(url, BURNT, tmp_path / "outbox.jsonl")
    assert (billing["classification"].category, billing["team"]) == ("billing", "Payments")
    assert (burnt["classification"].needs_escalation, burnt["team"]) == (True, "Workshop")
    assert "unplugged" in burnt["rule"]


async def test_a_broken_engine_is_not_hidden_by_fallbacks(tmp_path: Path) -> None:
    with stub_engine(lambda body: ("", "stop")) as url:
        dead = url
    with pytest.raises(Exception, match="Connection error"):
        await answered(dead, BILLING, tmp_path / "outbox.jsonl")


def test_the_graph_knows_nothing_of_orla_lg() -> None:
    for module in (graph.__file__, graph.__file__.replace("graph.py", "fallbacks.py")):
        tree = ast.parse(Path(module).read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        ours = {name for name in imported if name.split(".")[0] in ("orla_lg", "orla_lg_llamacpp")}
        assert ours <= {"orla_lg.demo.fallbacks", "orla_lg.demo.tools"}, ours


# Checks and data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dear [Customer Name], a payment taken twice is returned to the same card within 5 working days.",
        "We are glad. We are glad. We are glad. We are glad. We are glad. We are glad to help you today.",
        "A payment taken twice is returned to the same card within 10 working days.",
        "Thank you very much for your patience and your continued trust in our company and its brand.",
    ],
)
def test_no_customer_gets_gibberish(text: str) -> None:
    rule = "A payment taken twice is returned to the same card within 5 working days."
    assert presentable(text, BILLING, rule) is None


def test_a_category_that_the_ticket_supports_is_the_models_to_choose() -> None:
    ticket = "You charged me for the repair of my Brisa purifier, and it is broken again."
    ruled = classified_by_rules(ticket)
    kept = {c: corrected(ruled.model_copy(update={"category": c}), ticket).category for c in Category.__args__}
    assert kept == {c: c if c in ("billing", "technical") else ruled.category for c in Category.__args__}


def test_a_letter_is_cut_where_it_goes_wrong() -> None:
    rule = "A payment taken twice is returned to the same card within 5 working days."
    assert presentable(f"{rule} {rule} And [Name] and so", BILLING, rule) == rule


def test_every_category_has_policy_rules_and_a_team() -> None:
    teams = teams_in(read_team_descriptions.invoke({}))
    for category in Category.__args__:
        policy = read_policy_yaml.invoke({"policy": category})
        assert yaml.safe_load(policy)["policy"] == category
        assert len(rules_in(policy)) == 3
        assert teams[category]
    assert len(set(teams.values())) == 4


def test_all_tickets_can_be_answered_by_rules_alone() -> None:
    for ticket in tickets():
        found = classified_by_rules(ticket)
        assert found.issue in phrases_of(ticket)
        for rule in _all_rules():
            Email(
                subject=found.issue, body=letter(template(found, rule), team="Front BackendScheduler", escalated=True)
            )
    assert len(tickets()) >= 24
    kinds = {classified_by_rules(ticket).category for ticket in tickets()}
    assert kinds == set(Category.__args__)


def test_tickets_are_picked_in_order_shuffled_or_again() -> None:
    assert pick(3) == tickets()[:3]
    assert pick(5, seed=1) == pick(5, seed=1) != pick(5)
    assert len(pick(100)) == 100


# The run


@pytest.mark.parametrize(
    ("category", "priority"), [("billing", 8), ("technical", 8), ("shipping", 5), ("general", 5)]
)
def test_hints_follow_the_classification(category: Category, priority: float) -> None:
    found = classified_by_rules(BILLING).model_copy(update={"category": category})
    assert priorities("reply", {"classification": found}) == Hints(priority=priority)
    assert priorities("classify", {"ticket": BILLING}) is None


def unwatched(board: Board, statistics: Any) -> AbstractContextManager[None]:
    return nullcontext()


def test_priorities_reach_the_records(tmp_path: Path) -> None:
    with stub_engine(clever) as url:
        letters = [BILLING, "What are your opening hours? I like the Lumo lamp."]
        outcome = run(Plan(letters, tmp_path / "outbox.jsonl", url, "stub", "openai"), unwatched)
    seen = {(record.stage, record.priority) for record in outcome.board.records()}
    assert seen == {("classify", 0.0)} | {(stage, p) for stage in STAGES[1:] for p in (8.0, 5.0)}
    assert outcome.board.done == 2 and not outcome.interrupted
    assert set(outcome.emails) == {1, 2}


def test_a_ticket_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    class BackendScheduler:
        async def astream(self, state: Any, config: Any, stream_mode: str) -> Any:
            if state["ticket"] == "bad":
                raise OrlaError("no engine")
            yield {"reply": {"email": Email(subject="Your lamp", body="x" * 60)}}

    arm = ArmResult("wrapped", Board(2, 0.0))
    asyncio.run(answer_all(BackendScheduler(), Plan(["bad", "good"]), arm))
    assert set(arm.emails) == {2}
    assert [(line.ticket, line.kind, line.text) for line in arm.board.lines] == [(1, "error", "OrlaError: no engine")]


def test_control_c_ends_cleanly_with_a_report(tmp_path: Path) -> None:
    asked, ended = threading.Event(), threading.Event()

    def slow(body: dict[str, Any]) -> tuple[str, str]:
        if body["response_format"]["json_schema"]["name"] == "greeting":  # before the arm begins
            return clever(body)
        asked.set()
        ended.wait(30)
        return clever(body)

    with stub_engine(slow) as url:
        code = "import sys; from tests.test_demo import command_line; sys.exit(command_line(sys.argv[1:]))"
        arguments = ["demo", "-n", "3", "--plain", "--url", url, "--outbox", str(tmp_path / "o.jsonl")]
        child = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert asked.wait(60)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        ended.set()
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "0 of 3 answered" in out


def command_line(arguments: list[str]) -> int:
    return cli.main(arguments)


@pytest.mark.parametrize(
    "arguments", [["demo", "-n", "0"], ["demo", "-n", "3", "--ticket", "x"], ["demo", "-n", "x"]]
)
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        command_line(arguments)
    assert refusal.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_a_missing_key_and_a_missing_engine_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert command_line(["demo", "--url", "http://127.0.0.1:9/v1", "--api-key-env", "NO_SUCH_KEY"]) == 1
    assert "NO_SUCH_KEY" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert command_line(["demo", "--plain"]) == 1
    assert "pip install 'orla-lg[demo]'" in capsys.readouterr().err


def test_one_ticket_prints_its_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stub_engine(clever) as url:
        status = command_line(["demo", "--ticket", BILLING, "--url", url, "--outbox", str(tmp_path / "o.jsonl")])
    out = capsys.readouterr().out
    assert status == 0
    assert "Dear customer," in out and "Payments team" in out
    assert "1 of 1 answered" in out
    assert "all 6 answers of the model could be used" in out


# Bare against wrapped


def timed_call(stage: str, first_s: float | None, prompt: int | None = 100, cached: int | None = 0) -> TimedCall:
    first = None if first_s is None else 5.0 + first_s
    return TimedCall(stage, 5.0, first, 9.0, prompt, cached, 7)


BARE_CALLS = [timed_call("classify", 1.0), timed_call("policy_check", 8.0), timed_call("reply", 12.0, 200)]
WRAPPED_CALLS = [timed_call("classify", 1.0), timed_call("policy_check", 2.0), timed_call("reply", 3.0, 200, 180)]

BARS = """\
first token: what half of the 3 calls waited for it
  bare     ████████████████████████████████████████ 8.00 s
  wrapped  ██████████ 2.00 s
whole time: until the last letter was written
  bare     ████████████████████████████████████████ 60.0 s
  wrapped  ████████████████████ 30.0 s
prompt tokens computed again: the engine's cache did not have them
  bare     ████████████████████████████████████████ 400 of 400
  wrapped  ██████████████████████ 220 of 400"""

TABLE = """\
stage         calls  bare first  wrapped first  bare computed  wrapped computed
classify          1      1.00 s         1.00 s            100               100
policy_check      1      8.00 s         2.00 s            100               100
reply             1     12.00 s         3.00 s            200                20
all               3      8.00 s         2.00 s            400               220"""


def test_the_three_bars_and_the_table_are_what_was_counted() -> None:
    bare, wrapped = Figures.of("bare", BARE_CALLS, 60.0), Figures.of("wrapped", WRAPPED_CALLS, 30.0)
    assert timeline.plain(compare.bars(bare, wrapped)) == BARS
    assert timeline.plain(compare.table([("bare", BARE_CALLS), ("wrapped", WRAPPED_CALLS)])) == TABLE


@pytest.mark.parametrize(
    ("bare", "wrapped", "said"),
    [
        ((8.0, 60.0, 400), (2.0, 30.0, 220), "first token 4.0× sooner, all done 2.0× sooner, 45 % less computed."),
        ((2.0, 30.0, 220), (8.0, 60.0, 400), "first token 4.0× later, all done 2.0× later, 82 % more computed."),
        ((2.0, 30.0, 400), (2.05, 29.0, 390), "token as soon as bare, all done as soon as bare, as much computed."),
        ((None, 30.0, None), (None, 15.0, None), "Wrapped: all done 2.0× sooner."),
    ],
)  # fmt: skip
def test_the_line_says_better_worse_equal_or_nothing_as_it_is(bare: Any, wrapped: Any, said: str) -> None:
    figures = [Figures(arm, 3, first, whole, 400, computed)
               for arm, (first, whole, computed) in (("bare", bare), ("wrapped", wrapped))]  # fmt: skip
    line = compare.sentence(figures[0], figures[1])
    assert said in line and len(line) <= 81


def test_what_an_engine_does_not_say_is_no_bar() -> None:
    silent = [Figures.of(arm, [timed_call("reply", None, cached=None)], 1.0) for arm in ARMS]
    drawn = timeline.plain(compare.bars(silent[0], silent[1]))
    assert drawn.count("the engine does not say") == 4


def test_both_arms_are_counted_by_the_engines_word_and_the_first_call_of_all_is_not(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> tuple[str, str]:
        asked.append(body)
        return clever(body)

    with stub_engine(answer) as url:
        outcome = run(Plan(pick(2), url=url), unwatched)
    assert {body["model"] for body in asked} == {"stub"}, "the first that the engine serves, in both arms"
    bare, wrapped = (arm.figures for arm in outcome.arms)
    assert (bare.arm, wrapped.arm, bare.calls, wrapped.calls) == ("bare", "wrapped", 12, 12)
    assert (
        (bare.prompt_tokens, bare.computed_tokens) == (wrapped.prompt_tokens, wrapped.computed_tokens) == (1080, 600)
    )
    assert bare.first_s and wrapped.first_s and bare.whole_s and wrapped.whole_s
    first_words = [body["messages"][0]["content"].split(". ")[0] for body in asked]
    desks = dict.fromkeys(word for word in first_words if word.startswith("Desk "))
    assert len(desks) == 2, "nothing that one arm left in the engine's cache is found by the other"
    assert first_words.count("Ready?") == 2, "each arm asks its engine for a word before its time begins"


def test_embedded_engines_are_started_for_each_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    @contextmanager
    def embedded(name: str) -> Iterator[Backend]:
        started.append(name)
        with stub_engine(clever) as url:
            yield Backend(name, url, "stub", "openai", cost=running.HEAVY_COST)

    monkeypatch.setattr(running, "embedded", embedded)
    outcome = run(Plan(pick(1), arms=("wrapped", "bare")), unwatched)
    assert started == ["light", "heavy"] * 2 and [arm.arm for arm in outcome.arms] == ["wrapped", "bare"]
    assert len({round(sum(record.cost_usd or 0.0 for record in arm.board.records()), 9) for arm in outcome.arms}) == 1
    for arm in outcome.arms:
        assert all(record.cost_usd for record in arm.board.records())
        by_stage = {record.stage: record.backend for record in arm.board.records()}
        assert by_stage == {"classify": "light"} | dict.fromkeys(STAGES[1:], "heavy"), "the same mapping in both"


def test_it_ends_with_a_line_bars_and_a_table_and_writes_nothing_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with stub_engine(clever) as url:
        assert command_line(["demo", "-n", "2", "--plain", "--url", url]) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out.split("\n\n")
    assert said[0].startswith("2 tickets at once, each with its customer's file: bare, then wrapped\non http")
    assert said[0].count("answered") == 4 and "policy_check" not in said[0], "what goes on inside is asked for"
    assert said[1].startswith("Wrapped: first token ") and "\n" not in said[1]
    assert len(said[2].splitlines()) == 9 and said[3].startswith("stage ")
    assert "given up" not in said[4] and "engines" in said[4]


def test_details_tell_what_goes_on_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, outbox = tmp_path / "r.jsonl", tmp_path / "sub" / "o.jsonl"
    options = ["--details", "--outbox", str(outbox), "--records", str(records), "--arms", "wrapped"]
    with stub_engine(clever) as url:
        assert command_line(["demo", "-n", "1", "--plain", "--url", url, *options]) == 0
        assert cli.main(["explain", "--run", str(records)]) == 0
    said = capsys.readouterr().out
    for part in (
        "calls read_policy_yaml",
        "wait s",
        "cache      engine: ",
        "none: every answer",
        str(outbox),
        "6 calls",
    ):
        assert part in said, part
    assert "Wrapped:" not in said and len(outbox.read_text().splitlines()) == 1


def test_replaced_answers_are_told_once_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with stub_engine(BAD["garbage"]) as url:
        assert command_line(["demo", "-n", "1", "--plain", "--url", url, "--arms", "bare"]) == 0
    said = capsys.readouterr().out
    assert "of the model's 6 could not be used; rules and a template stood in; --details" in said
    assert said.count("replaced") + said.count("could not be used") == 1


@pytest.mark.parametrize("arms", ["", "bear", "bare,bare", "bare,,wrapped"])
def test_arms_that_are_none_are_refused(arms: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(["demo", "--arms", arms])
    assert "arm" in capsys.readouterr().err.splitlines()[-1]


def test_control_c_in_the_second_arm_keeps_the_first_and_compares_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.run_arm

    def interrupted(plan: Plan, arm: ArmResult, *rest: Any, desk: str) -> None:
        if arm.arm == "wrapped":
            raise KeyboardInterrupt
        real(plan, arm, *rest, desk=desk)

    monkeypatch.setattr(running, "run_arm", interrupted)
    with stub_engine(clever) as url:
        assert command_line(["demo", "-n", "1", "--plain", "--url", url]) == 130
    said = capsys.readouterr().out
    assert "bare: 1 of 1 answered" in said and "stopped    by Ctrl-C" in said and "Wrapped:" not in said


def test_files_of_customers_begin_differently_and_stay_what_they_are() -> None:
    files = [customer_file(number) for number in range(1, 40)]
    assert len({file.splitlines()[0] for file in files}) == len(files)
    assert files == [customer_file(number) for number in range(1, 40)]


# The view


def recorded(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[CallEvent], DemoResult]:
    """Return what the board of an arm hears in a run of four tickets, and the outcome."""
    events, hear = list[CallEvent](), Board.hear
    monkeypatch.setattr(Board, "hear", lambda board, event: events.append(event) or hear(board, event))
    with stub_engine(clever) as url:
        return events, run(Plan(pick(4), None, url, "stub", "openai", arms=(arm,)), unwatched)


@pytest.mark.parametrize("arm", ARMS)
def test_the_view_draws_every_moment_without_a_terminal(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from orla_lg.demo.view import frame

    events, outcome = recorded(arm, tmp_path, monkeypatch)
    monkeypatch.undo()
    board = Board(4, events[0].at_s)
    for number, run_id in enumerate(dict.fromkeys(event.run for event in events), start=1):
        board.expect(run_id or "", number)
    for width, height in ((80, 24), (120, 40)):
        replayed = Board(4, events[0].at_s)
        replayed.statistics = outcome.board.statistics
        for event in events:
            replayed.hear(event)
            console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
            console.print(frame(replayed, width, height))
            lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
            assert len(lines) <= height
            assert max(map(len, lines)) <= width
            assert all(any(stage in line for line in lines) for stage in STAGES)
        assert replayed.done == 4
        assert all(not state.waiting and not state.running and not state.inside for state in replayed.stages.values())


def test_long_queues_and_long_lines_stay_inside_the_terminal() -> None:
    pytest.importorskip("rich")
    from rich.console import Console

    from orla_lg.demo.view import frame

    board = Board(60, 0.0)
    for number in range(60):
        board.expect(f"run{number}", number)
        board.hear(CallEvent(Happening.QUEUED, 1.0, "w", f"run{number}", "classify", f"c{number}", "light"))
        board.note(1.0, f"run{number}", "classify", "error", "it went wrong " * 20)
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    console.print(frame(board, 80, 24))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    assert any("60 waiting" in line for line in lines)


@pytest.mark.parametrize("arm", ARMS)
def test_the_table_adds_up(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, outcome = recorded(arm, tmp_path, monkeypatch)
    cells = {row.cells[0]: row.cells for row in report.rows(outcome.board)}
    assert [cells[stage][2] for stage in (*STAGES, "all")] == ["4", "8", "8", "4", "24"]
    assert cells["all"][5:8] == ("2,160", "960 44%", "216")
    assert "4 of 4 answered" in report.as_text(outcome.board)


def test_a_picture_is_written_and_asks_for_nothing_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    with stub_engine(clever) as url:
        picture = tmp_path / "demo.svg"
        options = ["--url", url, "--plain", "--outbox", str(tmp_path / "o.jsonl"), "--save-svg", str(picture)]
        assert command_line(["demo", "-n", "4", *options]) == 0
    drawn = picture.read_text()
    assert "policy_check" in drawn
    assert "cdnjs" not in drawn and "@font-face" not in drawn


def test_lines_name_ticket_stage_and_what_happened() -> None:
    board, lines = Board(1, 10.0), []
    board.queues = frozenset({"heavy"})
    board.sink = lines.append
    board.expect("run", 1)
    board.hear(CallEvent(Happening.QUEUED, 10.5, "run", "run", "reply", "c1", "heavy"))
    assert board.backends["heavy"].waiting == {"c1": 1}
    board.hear(CallEvent(Happening.DISPATCHED, 12.0, "run", "run", "reply", "c1", "heavy"))
    assert board.stages["reply"].running == {"c1"}
    board.hear(CallEvent(Happening.TOOL_STARTED, 12.5, "run", "run", "reply", detail="send_email"))
    assert [(line.ticket, line.stage, line.text) for line in lines] == [
        (1, "reply", "waited 1.5 s for heavy"),
        (1, "reply", "calls send_email"),
    ]


# The real engine


@pytest.mark.engine
@pytest.mark.slow
def test_three_tickets_on_the_embedded_engines(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    outcome = run(Plan(pick(3), tmp_path / "outbox.jsonl", arms=("wrapped",)), unwatched)
    board = outcome.board
    assert (board.done, board.failed) == (3, 0)
    by_stage = {name: state.records for name, state in board.stages.items()}
    assert {name: len(records) for name, records in by_stage.items()} == dict(zip(STAGES, (3, 6, 6, 3), strict=True))
    assert all(record.error is None and record.ttft_s is not None for record in board.records())
    assert {record.backend for record in by_stage["classify"]} == {"light"}
    assert {record.backend for stage in STAGES[1:] for record in by_stage[stage]} == {"heavy"}
    reused = [record for record in by_stage["reply"] if (record.cached_tokens or 0) > 60]
    assert reused, [record.cached_tokens for record in by_stage["reply"]]
    assert len((tmp_path / "outbox.jsonl").read_text().splitlines()) == 3
    (arm,) = outcome.arms
    assert arm.figures.computed_tokens == arm.counted_tokens, "the engines' counters say what their answers say"
    assert board.statistics is not None
    for name, backend in board.statistics.backends.items():
        assert backend.memory.slots_held == 0, name
        assert backend.queue.in_flight == 0, name
        assert any(effect.startswith("flush:") for effect in backend.memory.effects), (name, backend.memory.effects)


def test_a_dead_engine_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outbox = tmp_path / "o.jsonl"
    arguments = ["demo", "-n", "3", "--plain", "--url", "http://127.0.0.1:9/v1"]
    assert command_line([*arguments, "--outbox", str(outbox)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("does not answer") == 1
    assert "#01" not in printed.out


def test_an_empty_ticket_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line(["demo", "--ticket", "  "])
    assert "the ticket is empty" in capsys.readouterr().err
