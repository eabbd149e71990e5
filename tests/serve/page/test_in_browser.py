"""The page in a real browser (``ORLA_TEST_CHROMIUM``): what is seen, what a click does, and what it never loads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.core.engine.health import Health
from orla_lg.demo.graph import chat_model, support_graph
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import make, until
from tests.serve.in_thread import Running
from tests.serve.page.reading import ask, served
from tests.stub_engine import Gate, Reply, Seen, StubEngine

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = os.environ.get("ORLA_TEST_CHROMIUM")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason='ORLA_TEST_CHROMIUM names no browser: eval "$(.ci/chromium.sh start)"'
)

PATIENCE_MS = 20_000
PHONE, WIDE = {"width": 390, "height": 844}, {"width": 1440, "height": 900}
BOTH = (KeyScope.VIEW, KeyScope.CONTROL)
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
STAGES = ("classify", "policy_check", "route_ticket", "reply")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert BROWSER is not None and shutil.which(BROWSER), f"ORLA_TEST_CHROMIUM names no program: {BROWSER!r}"
    as_root = ["--no-sandbox"] if os.getuid() == 0 else []
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=as_root)
        yield running
        running.close()


class Tab:
    """One open page, whose faults and requests are noted."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.faults: list[str] = []
        self.elsewhere: list[str] = []
        self.refusals = 0
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.faults.append(f"{error}"))
        page.on(
            "request", lambda request: None if request.url.startswith(url) else self.elsewhere.append(request.url)
        )
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective))"
        )
        page.goto(url + "/")

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            is_refusal = "the server responded with a status of 4" in message.text or "ERR_CONNECTION" in message.text
            self.refusals += is_refusal
            if not is_refusal:
                self.faults.append(message.text)

    def sees(self, selector: str, text: str | re.Pattern[str] | None = None, *, hidden: bool = False) -> Any:
        found = self.page.locator(selector)
        if hidden:
            playwright.expect(found).to_be_hidden()
        elif text is None:
            playwright.expect(found).to_be_visible()
        else:
            playwright.expect(found).to_contain_text(text)
        return found

    def clicks(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def stage(self, name: str) -> str:
        return f'.stage[data-stage="{name}"]'


@contextlib.contextmanager
def tab(browser: Any, url: str, **given: Any) -> Iterator[Tab]:
    """Open the page in a context of its own; at the end nothing was wrong, and nothing was asked of another host."""
    context = browser.new_context(viewport=given.pop("viewport", WIDE), **given)
    context.set_default_timeout(PATIENCE_MS)
    try:
        opened = Tab(context.new_page(), url)
        yield opened
        assert not opened.faults and not opened.elsewhere
        assert opened.page.evaluate("window.hit") is None
    finally:
        context.close()


class Engine:
    """A stub whose answers are held as long as a gate is set."""

    def __init__(self, stub: StubEngine) -> None:
        self.stub = stub
        self.gate: Gate | None = None
        stub.rule = lambda seen: Reply(gate=self.gate)

    @contextlib.contextmanager
    def held(self) -> Iterator[Gate]:
        gate = self.gate = Gate()
        try:
            yield gate
        finally:
            self.gate = None
            gate.open()

    @property
    def requests(self) -> int:
        return len(self.stub.requests)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with StubEngine() as stub:
        yield Engine(stub)


@pytest.fixture(scope="module")
def running(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without keys."""
    with served(tmp_path_factory.mktemp("page"), engine.stub) as running:
        yield running


@contextlib.contextmanager
def meanwhile(*done: Callable[[], Any]) -> Iterator[None]:
    """Do things in threads, and wait for them at the end."""
    threads = [threading.Thread(target=each, daemon=True) for each in done]
    for each in threads:
        each.start()
    yield
    for each in threads:
        each.join(20.0)
        assert not each.is_alive()


def test_a_run_of_the_support_desk_is_seen_from_start_to_end(browser: Any, tmp_path: Path) -> None:
    gates: dict[str, Gate] = {}

    def held(seen: Seen) -> Reply:
        asked = f"{seen.body}"
        first = "Answer with category" in asked and "assistant" not in asked
        return Reply(gate=gates["classify" if first else "rest"])

    def run() -> None:
        with Orla.remote(running.url) as orla:
            models = [chat_model(running.url + "/v1", name) for name in ("main", "other")]
            graph = orla.wrap(support_graph(*models, None).compile(name="support desk"))
            asyncio.run(graph.ainvoke({"ticket": "My lamp is broken."}, {"configurable": {"thread_id": "ticket-7"}}))

    gates = {"classify": Gate(), "rest": Gate()}
    with StubEngine(rule=held) as stub, served(tmp_path, stub) as running, tab(browser, running.url) as seen:
        seen.sees("#condition", "live")
        seen.sees("#welcome", "No calls yet")
        seen.sees("#curl", f"curl {running.url}/v1/chat/completions")
        with meanwhile(run):
            for name in STAGES:
                seen.sees(seen.stage(name))
            seen.sees(f"{seen.stage('classify')}.is-prefill")
            seen.sees("#welcome", hidden=True)
            seen.sees("#workflow-list", "ticket-7")
            seen.sees("#timeline-title", "Timeline of ticket-7")
            gates["classify"].open()
            seen.sees(seen.stage("classify"), "✓ 1")
            for name in ("policy_check", "route_ticket"):
                seen.sees(f"{seen.stage(name)}.is-prefill")
            gates["rest"].open()
            for name in STAGES:
                seen.sees(seen.stage(name), "✓")
        for name in (*STAGES, "read_policy_yaml"):
            seen.sees(f'#timeline .lane-name:text-is("{name}")')
        assert seen.page.locator("#timeline .span").count() >= 6
        seen.sees("#workflow-list", re.compile(r"ticket-7[\s\S]*[5-9] calls"))


def test_a_pause_by_click_holds_calls_and_a_second_tab_agrees(browser: Any, running: Running, engine: Engine) -> None:
    with tab(browser, running.url) as one, tab(browser, running.url) as other:
        before = engine.requests
        one.clicks("Pause main")
        for each in (one, other):
            each.sees('[data-backend="main"] .pill', "drained")
        with meanwhile(lambda: ask(running.url, "held-1"), lambda: ask(running.url, "held-2")):
            for each in (one, other):
                each.sees("#faults", "main is paused")
                each.sees("#faults", "2 calls wait")
                each.sees("#waiting-body", "its backend to be resumed")
            assert engine.requests == before
            other.clicks("Resume main")
        one.sees('[data-backend="main"] .pill', "open")
        one.sees("#faults", hidden=True)
        assert engine.requests == before + 2


def test_a_drain_is_asked_for_again_and_a_priority_is_set(browser: Any, running: Running, engine: Engine) -> None:
    backend = running.orla.core.serving.schedulers["main"]
    with tab(browser, running.url) as seen, engine.held() as gate:
        calls = [lambda at=at: ask(running.url, f"thread-{at}") for at in range(3)]
        with meanwhile(*calls):
            seen.sees('[data-backend="main"] .queued', "1")
            (waiting,) = [each.call for each in backend.queue]
            seen.page.locator("#workflow-list button", has_text=waiting.identity.name).click()
            seen.page.get_by_label("Priority").fill("7")
            seen.clicks("Set")
            until(lambda: waiting.hints.priority == 7.0, 5.0)
            seen.clicks("Drain main")
            seen.clicks("Cancel")
            assert not backend.queue.paused
            seen.clicks("Drain main")
            seen.clicks("Drain")
            seen.sees('[data-backend="main"] .pill', "paused")
            gate.open()
            seen.sees("#toasts", "main is drained")
            seen.page.get_by_role("button", name="Resume main").focus()
            seen.page.keyboard.press("Enter")
            until(lambda: not backend.queue.paused, 5.0)


def test_signing_in_with_keys_and_out_again(browser: Any, engine: Engine, tmp_path: Path) -> None:
    store = MemoryStore()
    use, view, both = (make(store, scopes=scopes)[1] for scopes in ((KeyScope.USE,), (KeyScope.VIEW,), BOTH))
    with served(tmp_path, engine.stub, store) as running, tab(browser, running.url) as seen:
        key = seen.page.get_by_label("Key", exact=True)
        for wrong, said in (("orla-" + "a" * 52, "no such key"), (use, "view is needed here")):
            key.fill(wrong)
            seen.clicks("Sign in")
            seen.sees("#sign-in-fault", said)
        key.fill(view)
        seen.clicks("Sign in")
        seen.sees("#condition", "live")
        seen.sees("#caller", "view only")
        seen.sees('[data-backend="main"]')
        assert seen.page.get_by_role("button", name="Pause main").count() == 0
        kept = seen.page.context.cookies()
        assert [(each["httpOnly"], each["sameSite"]) for each in kept] == [(True, "Strict")]
        held = seen.page.evaluate("JSON.stringify([document.cookie, {...localStorage}, document.body.outerHTML])")
        assert view not in f"{kept}{held}" and "orla-session" not in held
        seen.clicks("Sign out")
        seen.sees("#sign-in-title")
        assert not seen.page.context.cookies()
        seen.page.get_by_label("Key", exact=True).fill(both)
        seen.page.keyboard.press("Enter")
        seen.clicks("Pause other")
        seen.sees('[data-backend="other"] .pill', "drained")


def named_by_users(url: str) -> None:
    """Run a graph whose node, thread and tenant have names that mean to do something."""
    model = chat_model(url + "/v1", "main")
    builder = StateGraph(MessagesState)
    builder.add_node(HOSTILE, lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_edge(START, HOSTILE)
    with Orla.remote(url) as orla:
        where: Any = {"thread_id": HOSTILE, "orla": {"tenant": HOSTILE}}
        orla.wrap(builder).invoke({"messages": [("user", "hello")]}, {"configurable": where})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_and_scrolls_down_alone(browser: Any, running: Running, scheme: str) -> None:
    named_by_users(running.url)
    assert ask(running.url, "w" * 500, "s" * 300) == 200
    with tab(browser, running.url, viewport=PHONE, color_scheme=scheme, reduced_motion="reduce") as seen:
        seen.sees("#workflow-list", HOSTILE[:40])
        seen.page.locator("#workflow-list button", has_text=HOSTILE[:40]).click()
        seen.sees(".as-table")
        seen.sees("#graph-list")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert seen.page.locator("#workflow-list img").count() == 0
        below = seen.page.locator("main button:visible").evaluate_all(
            "all => all.filter(b => b.offsetHeight < 32).length"
        )
        assert below == 0


def test_a_lost_server_is_said_and_found_again(browser: Any, engine: Engine, tmp_path: Path) -> None:
    with served(tmp_path, engine.stub) as running:
        url, context = running.url, contextlib.ExitStack()
        seen = context.enter_context(tab(browser, url))
        seen.sees("#condition", "live")
    with context:
        seen.sees("#condition", "connection lost")
        seen.sees("#faults", "Trying again")
        assert seen.page.get_by_role("button", name="Pause main").count() == 0
        with served(tmp_path, engine.stub, address=url.removeprefix("http://")):
            seen.sees("#condition", "live")
            seen.sees("#faults", hidden=True)


def test_an_engine_that_is_gone_is_said(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StubEngine() as stub, served(tmp_path, stub) as running, tab(browser, running.url, viewport=PHONE) as seen:
        seen.sees("#condition", "live")
        seen.sees("#welcome")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        monkeypatch.setattr(Health, "reachable", property(lambda _health: False))
        seen.sees("#faults", "main is gone")


def test_no_script_of_a_name_and_none_from_elsewhere_would_run(browser: Any, running: Running) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(running.url + "/")
    violations = page.evaluate("""async () => {
      const found = [];
      addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
      const inline = document.createElement("div");
      try { inline.innerHTML = "<b>x</b>"; } catch { found.push("trusted-types"); }
      const image = new Image();
      image.src = "http://127.0.0.1:9/x.png";
      inline.setAttribute("style", "color: red");
      await fetch("http://127.0.0.1:9/").catch(() => {});
      await new Promise((resolve) => setTimeout(resolve, 200));
      return found;
    }""")
    assert {"trusted-types", "img-src", "connect-src", "style-src-attr"} <= set(violations)
    context.close()


LAYOUT = """async (graphs) => {
  const { layered } = await import("/page/layout.js");
  return graphs.map(([stages, arrows]) => {
    const plan = layered(stages, arrows);
    return [[...plan.places].map(([name, { depth, at }]) => [name, depth, at]), plan.arrows];
  });
}"""


def test_stages_stand_in_layers_whatever_the_graph(browser: Any, running: Running) -> None:
    rng = random.Random(3)
    graphs = []
    for _ in range(40):
        stages = [f"s{number}" for number in range(rng.randint(1, 12))]
        ends = [(rng.choice(["__start__", *stages]), rng.choice([*stages, "__end__"])) for _ in range(16)]
        graphs.append([stages, [[*pair, True] for pair in dict.fromkeys(ends)]])
    page = browser.new_page()
    page.goto(running.url + "/")
    for (stages, arrows), (places, drawn) in zip(graphs, page.evaluate(LAYOUT, graphs), strict=True):
        depth = {name: deep for name, deep, _ in places}
        assert {"__start__", "__end__", *stages} <= set(depth) and len(drawn) == len(arrows)
        assert len({(deep, at) for _, deep, at in places}) == len(places), "two stages in one place"
        assert depth["__start__"] == 0 and all(0 < depth[stage] < depth["__end__"] for stage in stages)
        for arrow in drawn:
            way = [depth[each] for each in (arrow["from"], *arrow["through"], arrow["to"])]
            assert arrow["back"] or way == list(range(way[0], way[-1] + 1)), "no arrow runs behind a stage"
    page.close()
