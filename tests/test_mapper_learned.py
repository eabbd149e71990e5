from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any, TypedDict

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langgraph.graph import START, StateGraph

from orla_lg import Ask, Backend, ConfigError, Orla
from orla_lg.mappers import commands
from orla_lg.mappers.alike import likely, near_duplicates
from orla_lg.mappers.features import DENSE, MAX_CHARS, UserPrompt, features, prompt_of
from orla_lg.mappers.learned import EmbeddingMapper, Endpoint, Isotonic, LearnedMapper, Model, Platt, load
from tests.conftest import at, chat
from tests.core.fakes import a_call
from tests.stub_engine import StubEngine

PLAIN = Model(-1.0, tuple(0.0 for _ in DENSE), 0.5)


def weighing(name: str, weight: float, **more: Any) -> Model:
    return replace(PLAIN, dense=tuple(weight if one == name else 0.0 for one in DENSE), **more)


def call(text: str, stage: str = "node", **ask: Any) -> Any:
    made = a_call(stage=stage)
    made.ask = Ask("auto", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}], **ask)
    return made


def value(name: str, prompt: UserPrompt) -> float:
    return features(prompt, 0)[0][DENSE.index(name)]


NAMES = [first + last for first in ("An", "Be", "Ki", "Lo", "Mi") for last in ("na", "ra", "to", "li", "ne", "vo")]


def made_rows(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts that differ in what they ask for: sums are complex, greetings are simple."""
    dice, rows = random.Random(seed), []
    for number in range(count):
        if number % 2:
            text = f"Find the integer ${dice.randint(2, 99)}^x + {dice.randint(2, 99)}$ modulo {dice.randint(2, 9)}."
        else:
            how, when = dice.choice(["wave", "smile", "nod", "bow", "sing"]), dice.choice(["kindly", "now", "once"])
            text = f"Say {when} hello to {NAMES[number // 2 % len(NAMES)]} and {how}, please."
        rows.append({"prompt": text, "label": "complex" if number % 2 else "simple", "from": "ab"[number % 4 // 2]})
    return rows


def written(folder: Path, rows: list[Any]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


def run(*line: object) -> int:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["mapper", *map(str, line)])
    return int(args.run(args))


# Features -------------------------------------------------------------------------------------------------


@given(st.text(st.characters(), max_size=300), st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_features_take_any_text(text: str, buckets: int) -> None:
    dense, words = features(UserPrompt(text), buckets)
    assert len(dense) == len(DENSE)
    assert all(map(float("inf").__gt__, map(abs, dense)))
    assert all(0 <= bucket < buckets for bucket in words)


def test_features_of_nothing_and_of_very_much() -> None:
    assert not any(features(UserPrompt(""), 8)[0])
    huge = features(UserPrompt("(((1.2.3^^^\\\\ $ A. " * 500_000), 64)[0]
    assert huge[DENSE.index("chars")] > 15
    assert features(UserPrompt("a" * MAX_CHARS * 3 + "?"), 0)[0][DENSE.index("question_marks")] > 0


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("latex", r"Solve $\frac{1}{2}x$", "Solve a half of x"),
        ("options", "Which?\nA. one\nB. two", "Which, one or two?"),
        ("numbers", "7 and 8 and 9.5", "seven"),
        ("cue_computes", "Compute the sum", "Tell me of the sum"),
        ("cue_codes", "Implement a function", "Invite a friend"),
        ("question_marks", "Why? How?", "Because."),
        ("code_signs", "{a[0];}", "a zero"),
    ],
)
def test_a_feature_rises_with_what_it_is_named_for(name: str, more: str, less: str) -> None:
    assert value(name, UserPrompt(more)) > value(name, UserPrompt(less))


def test_a_call_brings_its_surroundings() -> None:
    found = prompt_of(call("And now?", tools=True))
    assert found == UserPrompt("And now?", len("Be kind."), 1, True, False)
    nothing = call("x")
    nothing.ask = Ask("auto", [{"role": "system", "content": "Be kind."}, "no message"])
    assert prompt_of(nothing) is None


# Deciding -------------------------------------------------------------------------------------------------


def test_the_threshold_decides_and_the_numbers_are_told() -> None:
    mapper = LearnedMapper(weighing("latex", 2.0), "small", "big")
    simple, hard = mapper.map(call("Hello"), ()), mapper.map(call(r"\frac{1}{2} \sum \int"), ())
    assert simple is not None and hard is not None
    assert (simple.backend, simple.alternatives, simple.mapper) == ("small", ("big",), "learned")
    assert (hard.backend, hard.alternatives) == ("big", ("small",))
    assert simple.reason == "complex with probability 0.27 < 0.50"
    assert [each.backend for each in hard.considered] == ["big", "small"]
    assert hard.considered[0].numbers["probability_complex"] > hard.considered[0].numbers["threshold"] == 0.5
    always = LearnedMapper(PLAIN, threshold=0.0).map(call("Hello"), ())
    assert always is not None and always.backend == "heavy"


def test_it_declines_outside_a_graph_and_without_a_text() -> None:
    mapper = LearnedMapper(PLAIN)
    assert mapper.map(call("Hello", stage=""), ()) is None
    assert mapper.map(call(""), ()) is None


def test_mistakes_are_told() -> None:
    assert LearnedMapper(PLAIN, "lihgt").check_backends(["light", "heavy"]) == [
        "LearnedMapper names backend 'lihgt', which does not exist; did you mean 'light'? known: heavy, light"
    ]
    with pytest.raises(ConfigError, match="threshold must be from 0 to 1"):
        LearnedMapper(PLAIN, threshold=2)
    with pytest.raises(ConfigError, match="this model is one for LearnedMapper"):
        EmbeddingMapper(PLAIN)


class Said(TypedDict):
    text: str


def test_prompts_of_a_wrapped_graph_reach_the_right_backend(engine: StubEngine, other_engine: StubEngine) -> None:
    model = chat(engine)
    graph = StateGraph(Said)
    graph.add_node("answer", lambda state: {"text": str(model.invoke(state["text"]).content)})
    graph.add_edge(START, "answer")
    backends: list[Backend] = [at(engine, "light"), at(other_engine, "heavy")]
    with Orla(backends, LearnedMapper(weighing("latex", 2.0))) as orla:
        wrapped = orla.wrap(graph.compile())
        wrapped.invoke({"text": "Hello"})
        wrapped.invoke({"text": r"\frac{1}{2} \sum \int"})
        records = list(orla.records())
    assert [(record.backend, record.mapper) for record in records] == [("light", "learned"), ("heavy", "learned")]


def test_a_decision_is_quick() -> None:
    mapper = LearnedMapper(replace(PLAIN, buckets=1024, hashed=dict.fromkeys(range(1024), 0.01)))
    asked = call("what is the least 12 x^2 of it, if " * 14)
    taken = []
    for _ in range(300):
        start = time.thread_time()
        mapper.map(asked, ())
        taken.append(time.thread_time() - start)
    assert statistics.median(taken) < 0.002  # the benchmark says 0.3 ms; a loaded machine is given room


# Calibration and the file -----------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_calibration_never_falls(scores: list[float]) -> None:
    for curve in (Platt(0.7, -0.2), Platt(0.0, 1.0), Isotonic((-3.0, -1.0, 4.0), (0.0, 0.4, 1.0))):
        said = [curve.probability(score) for score in sorted(scores)]
        assert all(later >= earlier - 1e-12 for earlier, later in pairwise(said))
        assert all(0 <= p <= 1 for p in said)


@pytest.mark.parametrize("curve", [Platt(1.5, 0.1), Isotonic((-1.0, 2.0), (0.1, 0.9))])
def test_a_file_says_again_what_was_saved(curve: Any, tmp_path: Path) -> None:
    model = weighing("words", 0.3, calibration=curve, buckets=16, hashed={3: 0.5}, expected={"wanted": "accuracy"})
    model.save(tmp_path / "m.json")
    again = load(tmp_path / "m.json")
    assert again == model
    assert again.probability(UserPrompt("to be or not")) == model.probability(UserPrompt("to be or not"))
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("at_", "put", "said"),
    [
        ("format", "pickle", "'format' is not"),
        ("version", 2, "'version' is 2"),
        ("features", {"version": 99, "buckets": 0}, "fit it anew"),
        ("features", {"version": 1, "buckets": -1}, "'features.buckets' is -1"),
        ("intercept", "1", "'intercept' is '1', not a finite number"),
        ("threshold", float("nan"), "'threshold' is nan"),
        ("dense", {}, "'dense' has the wrong names"),
        ("dense", [], "'dense' has the wrong names"),
        ("hashed", {"3": 1.0}, "'hashed' has bucket 3"),
        ("embedding", [1.0], "belong together"),
        ("embedding", None, "is no list"),
        ("calibration", {"kind": "platt", "slope": -1.0, "offset": 0.0}, "would be less probable"),
        ("calibration", {"kind": "magic"}, "neither 'platt' nor 'isotonic'"),
        ("calibration", {"kind": "isotonic", "logits": [1, 0], "probabilities": [0, 1]}, "no rising table"),
        ("calibration", {"kind": "isotonic", "logits": [0, 1], "probabilities": [0, 2]}, "leave 0 to 1"),
        ("calibration", {}, "'kind' is missing"),
        ("expected", 3, "no learned mapper"),
    ],
)
def test_a_damaged_file_is_refused(at_: str, put: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps({**PLAIN.asdict(), at_: put}), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as caught:
        load(file)
    assert str(file) in str(caught.value)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    for text, said in (("{", "no JSON"), ("[" * 100_000, "no JSON"), ("[]", "'format'")):
        (tmp_path / "m.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / "m.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        PLAIN.save(tmp_path / "none" / "m.json")


# Embeddings -----------------------------------------------------------------------------------------------


class Embedder(BaseHTTPRequestHandler):
    """Answers with the share of capitals, slowly if asked about sloths."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = asked["input"]
        if "sloth" in text:
            time.sleep(0.6)
        vector = [sum(map(str.isupper, text)) / len(text), *([1.0] if "three" in text else []), 0.0]
        body = json.dumps({"data": [{"embedding": vector}]}).encode()
        self.send_response(500 if "broken" in text else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked about sloths has left
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def embedder() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Embedder)
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_embedding_decides_or_the_mapper_declines(embedder: str) -> None:
    mapper = EmbeddingMapper(replace(PLAIN, embedding=(9.0, 0.0), endpoint=Endpoint(embedder, "e")), timeout_s=0.3)

    def backend(text: str) -> str | None:
        chosen = asyncio.run(mapper.amap(call(text), ()))
        return chosen and chosen.backend

    assert [backend("HELP ME"), backend("help me")] == ["heavy", "light"]
    assert mapper.failures == 0
    assert [backend("a sloth"), backend("broken"), backend("three")] == [None, None, None]
    assert mapper.failures == 3
    lone = EmbeddingMapper(mapper.model, url="http://127.0.0.1:9/v1")
    assert asyncio.run(lone.amap(call("HELP ME"), ())) is None
    with pytest.raises(ConfigError, match="timeout_s must be positive"):
        EmbeddingMapper(mapper.model, timeout_s=0)


def test_fitting_on_embeddings(embedder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    rows = made_rows(40)
    for row in rows[1::2]:
        row["prompt"] = row["prompt"].upper()
    out = tmp_path / "m.json"
    assert run("fit", written(tmp_path, rows), "--out", out, "--features", "embedding", "--url", embedder,
               "--folds", 3, "--repeats", 1) == 0  # fmt: skip
    assert load(out).endpoint == Endpoint(embedder, "default")
    assert run("try", out, "HELP ME AT ONCE") == 0
    assert "complex with probability" in capsys.readouterr().out


# Fitting --------------------------------------------------------------------------------------------------


def test_inference_is_what_scikit_learn_says() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    pipeline, preprocessing = (pytest.importorskip(f"sklearn.{part}") for part in ("pipeline", "preprocessing"))
    from orla_lg.mappers import fit

    rows = made_rows(40)
    prompts, labels = [UserPrompt(row["prompt"]) for row in rows], [row["label"] == "complex" for row in rows]
    table = fit.Table(prompts, labels)
    every = (table.y >= 0).nonzero()[0]
    for candidate in fit.CHEAP:
        linear = fit.fit_linear(table, every, candidate)
        chosen = fit.Trained(candidate, linear, Platt(), 0.5, [0.5] * len(rows))
        model = fit.model_of(table, chosen, fit.Goal(), None)
        theirs = linear_model.LogisticRegression()
        theirs.classes_, theirs.coef_, theirs.intercept_ = (
            table.y[:2],
            linear.weights.reshape(1, -1),
            linear.intercept,
        )
        said = theirs.predict_proba(table.block(candidate))[:, 1]
        assert [model.probability(prompt) for prompt in prompts] == pytest.approx(list(said), abs=1e-9)
    scaled = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(C=0.1, max_iter=3_000)
    )
    said = scaled.fit(table.dense, table.y).decision_function(table.dense)
    ours = fit.fit_linear(table, every, fit.Candidate("l2", 0.1))
    assert list(ours.logits(table.dense)) == pytest.approx(list(said), abs=1e-6)


def test_thresholds_meet_what_is_wanted() -> None:
    pytest.importorskip("sklearn")
    from orla_lg.mappers.fit import Goal, choose_threshold

    probable = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    labels = [False, False, True, False, False, True, False, True, True, True]

    def sent(goal: Goal) -> list[float]:
        threshold = choose_threshold(probable, labels, goal)
        return [p for p in probable if p >= threshold]

    assert sent(Goal()) == probable[4:]
    assert sent(Goal(quality=0.6)) == [0.8, 0.9, 0.95]
    assert sent(Goal(quality=0.8)) == [0.6, 0.7, 0.8, 0.9, 0.95]
    assert sent(Goal(quality=1.0))[0] == 0.3
    assert sent(Goal(quality=0.0)) == sent(Goal(light_share=1.0)) == sent(Goal(cost=0.1)) == []
    assert sent(Goal(light_share=0.7)) == [0.8, 0.9, 0.95]
    assert sent(Goal(light_share=0.0)) == sent(Goal(cost=1.0)) == probable
    assert sent(Goal(cost=0.5, light_price=0.2)) == [0.8, 0.9, 0.95]  # 3 + 7 · 0.2 = 4.4 ≤ 5
    for wrong in ({"quality": 0.9, "cost": 0.5}, {"quality": 1.1}):
        with pytest.raises(ConfigError):
            Goal(**wrong)
    with pytest.raises(ConfigError, match="less than all-light costs"):
        choose_threshold(probable, labels, Goal(cost=0.1, light_price=0.2))


def test_figures_are_what_they_are_called() -> None:
    pytest.importorskip("sklearn")
    from orla_lg.mappers.fit import auc, calibration_error, score

    found = score([0.9, 0.6, 0.4, 0.2], [True, True, False, False], [True, False, True, False], 0.1)
    assert (found.accuracy, found.light_share, found.quality, found.complex_caught) == (0.5, 0.5, 0.75, 0.5)
    assert (found.cost, found.auc) == (pytest.approx(0.55), 0.75)
    assert auc([0.5, 0.5], [True, False]) == 0.5
    assert calibration_error([0.75] * 4, [True, True, True, False]) == 0.0
    assert calibration_error([1.0, 1.0], [False, False]) == 1.0


def test_calibration_is_fitted_to_be_believed() -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("sklearn")
    from orla_lg.mappers.fit import calibrate

    dice = random.Random(0)
    scores = numpy.array([dice.uniform(-6, 6) for _ in range(2_000)])
    labels = numpy.array([dice.random() < 1 / (1 + 2.718281828 ** (-score / 2)) for score in scores])
    platt, isotonic = calibrate(scores, labels, "platt"), calibrate(scores, labels)
    assert isinstance(platt, Platt) and platt.slope == pytest.approx(0.5, abs=0.06)
    assert isinstance(isotonic, Isotonic) and isotonic.probability(2.0) == pytest.approx(0.73, abs=0.1)
    assert calibrate(-scores, labels, "platt") == Platt(0.0, pytest.approx(0.0, abs=0.2))


def test_noise_is_not_learned() -> None:
    pytest.importorskip("sklearn")
    from orla_lg.mappers import fit

    dice, words = random.Random(3), ["find", "the", "red", "7", "of", "a", "big", "$x$", "why"]
    prompts = [UserPrompt(" ".join(dice.choices(words, k=20))) for _ in range(120)]
    labels = [dice.random() < 0.5 for _ in prompts]
    passes = fit.cross_validate(fit.Table(prompts, labels), fit.Goal(), folds=4, repeats=2)
    found = [fit.score(one.probable, one.sent, labels, 0.1) for one in passes]
    assert all(0.3 < one.accuracy < 0.65 for one in found)  # leaking selection would show here as accuracy
    assert all(one.brier < 0.32 for one in found)


def test_the_commands_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    file, out = written(tmp_path, made_rows()), tmp_path / "mapper.json"
    assert run("fit", file, "--out", out, "--quality", 0.9, "--folds", 5, "--repeats", 2, "--group-by", "from") == 0
    told = capsys.readouterr().out
    assert "learned, unseen prompts" in told and "left out in training" in told and f"written: {out}" in told
    model = load(out)
    assert model.cross_validated["accuracy"]["mean"] > 0.9
    assert model.expected["complex_caught"] >= 0.9
    assert "hello" not in out.read_text(encoding="utf-8").lower()
    assert run("show", out) == 0 and "what weighs most" in capsys.readouterr().out
    assert run("show", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trained"]["rows"] == 60
    assert run("try", out, "Say hello to Zoe and dance, please.") == 0
    assert capsys.readouterr().out.startswith("simple: complex with probability 0.")
    fresh = made_rows(seed=9)
    sent = [LearnedMapper(out).map(call(row["prompt"]), ()) for row in fresh]
    right = [one is not None and (one.backend == "heavy") == (row["label"] == "complex")
             for one, row in zip(sent, fresh, strict=True)]  # fmt: skip
    assert sum(right) >= 57


# Near-duplicates ------------------------------------------------------------------------------------------

TWINS = [
    "Reconcile these two invoices and say which was paid twice, with the amount and the date of each payment.",
    "reconcile these two invoices, and say which was paid twice, with the amount and the date of each payment!",
    "Please reconcile these two invoices and say which was paid twice, with the amount and the date of each payment.",
    "Reconcile these two invoices and say which was paid twice, with the amount and the day of each payment.",
]
OTHERS = [
    "Which of these two invoices was paid first?", "What is 3 + 4?", "What is 5 + 6?", "?!", "!!", "",
    "Fix my router", "Fix my modem", "Reconcile two invoices",
]  # fmt: skip


def test_near_duplicates_are_one_group_and_others_are_not() -> None:
    texts = [*OTHERS[:4], *TWINS[:2], *OTHERS[4:], *TWINS[2:], "Fix my router.", "x" * 9_000, "x" * 9_000]
    groups = near_duplicates(texts)
    twins = {groups[texts.index(twin)] for twin in TWINS}
    assert len(twins) == 1 and groups[-1] == groups[-2] and groups[-3] == groups[texts.index("Fix my router")]
    apart = [groups[texts.index(other)] for other in OTHERS]
    assert len({*apart, *twins}) == len(OTHERS) + 1
    assert groups == [min(n for n, group in enumerate(groups) if group == each) for each in groups]


def test_many_prompts_of_one_template_are_grouped_in_time() -> None:
    dice = random.Random(1)
    words = [f"word{n}" for n in range(500)]
    texts = [f"Classify this ticket by topic: {' '.join(dice.choices(words, k=12))}" for _ in range(400)]
    began = time.process_time()
    groups = near_duplicates([*texts, *texts])
    assert time.process_time() - began < 2.0
    assert groups[400:] == groups[:400] == list(range(400))


def test_no_fold_parts_what_is_nearly_the_same() -> None:
    pytest.importorskip("sklearn")
    from orla_lg.mappers import fit

    rows = made_rows(48)
    prompts = [UserPrompt(row["prompt"] + end) for row in rows for end in ("", "!", " ")]
    table = fit.Table(prompts, [row["label"] == "complex" for row in rows for _ in range(3)])
    every = (table.y >= 0).nonzero()[0]
    for seed in range(5):
        for known, unknown in fit._folds(table, every, 5, seed):
            assert not set(table.groups[known]) & set(table.groups[unknown])
            assert 0 < table.y[unknown].sum() < len(unknown), "both labels are in each fold"


def test_a_label_that_is_a_coincidence_of_copies_is_not_found_again() -> None:
    """Labels by the dice: nothing is to be learned, but copies of a row are easily known again."""
    pytest.importorskip("sklearn")
    from orla_lg.mappers import fit

    dice = random.Random(5)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(288)]
    texts = [" ".join(words[n : n + 12]) for n in range(0, 288, 12)]
    labels = [n % 2 == 0 for n in range(24)] * 3
    table = fit.Table([UserPrompt(text) for text in texts * 3], labels)

    def accuracy() -> float:
        (one,) = fit.cross_validate(table, fit.Goal(), folds=3, repeats=1)
        return fit.score(one.probable, one.sent, labels, 0.1).accuracy

    assert accuracy() < 0.7
    table.groups = (table.y >= 0).nonzero()[0]  # as if no prompt were like another
    assert accuracy() > 0.8


def test_too_few_different_prompts_are_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    rows, out = made_rows(120), tmp_path / "m.json"
    simple, complex_ = (
        list({row["prompt"]: row for row in rows if row["label"] == label}.values())
        for label in ("simple", "complex")
    )
    with pytest.raises(ConfigError, match="but only 20 simple and 5 complex ones are different texts"):
        run("fit", written(tmp_path, simple[:20] + complex_[:5] * 3), "--out", out)
    with pytest.raises(ConfigError, match="the rarer label has 11 different prompts, fewer than that"):
        run("fit", written(tmp_path, simple[:20] + complex_[:11] * 2), "--out", out, "--folds", 12)
    assert not out.exists()
    mixed = {**complex_[0], "label": "simple"}
    file = written(tmp_path, [*simple[:20], *complex_[:12] * 2, mixed])
    assert run("fit", file, "--out", out, "--folds", 3, "--repeats", 1) == 0
    said = capsys.readouterr().out
    assert "Near-duplicates: of 45 prompts 13 say nearly the same as another one." in said
    assert "Labels: 1 text stands there" in said
    assert "Few rows: 21 simple and 12 complex prompts are different, 4 complex in each of 3 folds." in said
    assert "(95 %)" in said


@pytest.mark.parametrize(("seen", "count", "low", "high"), [(1.0, 30, 0.88, 1.0), (0.5, 100, 0.40, 0.60)])
def test_what_a_share_of_few_may_be(seen: float, count: int, low: float, high: float) -> None:
    assert likely(seen, count) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"prompts.jsonl:3: no JSON"),
        ([], r":3: expected an object with 'prompt'"),
        ({"prompt": " ", "label": "simple"}, r":3: expected an object with 'prompt'"),
        ({"prompt": "x", "label": "hard"}, r":3: 'label' is 'hard'"),
        ({"prompt": "x", "label": ["simple"]}, r":3: 'label' is \['simple'\]"),
        ({"prompt": "x", "label": "simple"}, r":3: there is no 'from'"),
        ({"prompt": "x", "label": "simple", "from": 1, "turns": 0}, r":3: 'turns' is 0"),
        ({"prompt": "x", "label": "simple", "from": 1, "system": 1}, r":3: 'system' must be a text"),
        ({"prompt": "x", "label": "simple", "from": 1, "tools": "yes"}, r":3: 'tools' and 'json_schema' must be"),
    ],
)
def test_a_wrong_line_is_named(line: Any, said: str, tmp_path: Path) -> None:
    rows = made_rows(2)
    file = written(tmp_path, [*rows, line])
    with pytest.raises(ConfigError, match=said):
        run("fit", file, "--out", tmp_path / "m.json", "--group-by", "from")


def test_too_little_data_and_wrong_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "m.json"
    with pytest.raises(ConfigError, match="it needs 20 at least, 10 of each"):
        run("fit", written(tmp_path, made_rows(18)), "--out", out)
    with pytest.raises(ConfigError, match="cannot be read"):
        run("fit", tmp_path / "none.jsonl", "--out", out)
    file = written(tmp_path, made_rows(20))
    with pytest.raises(ConfigError, match="--folds 11"):
        run("fit", file, "--out", out, "--folds", 11)
    with pytest.raises(ConfigError, match="needs --url"):
        run("fit", file, "--out", out, "--features", "embedding")
    with pytest.raises(ConfigError, match="gives no embeddings: ConnectError"):
        run("fit", file, "--out", out, "--features", "embedding", "--url", "http://127.0.0.1:9/v1")
    for wrong in (["--quality", 2], ["--quality", "x"], ["--folds", 1], ["--cost", 0.5, "--quality", 0.5]):
        with pytest.raises(SystemExit):
            run("fit", file, "--out", out, *wrong)
    assert "it must be a share from 0 to 1" in capsys.readouterr().err
    assert not out.exists()


def test_fitting_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"pip install 'orla-lg\[mapper\]'"):
        run("fit", written(tmp_path, made_rows(20)), "--out", tmp_path / "m.json")


def test_an_answer_without_a_vector_is_an_error() -> None:
    from orla_lg.mappers.learned import embedding_of

    request = httpx.Request("POST", "http://e/v1/embeddings")
    for body in ({}, {"data": []}, {"data": [{"embedding": "base64"}]}, {"data": [{"embedding": []}]}):
        with pytest.raises(ConfigError):
            embedding_of(httpx.Response(200, json=body, request=request))
