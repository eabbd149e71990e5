"""``orla-lg mapper``: a mapper learned from your own labelled prompts: ``fit``, ``show``, ``try``."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from orla_lg.errors import ConfigError
from orla_lg.mappers.alike import different, near_duplicates, of_the_data
from orla_lg.mappers.features import DENSE, UserPrompt, sendable
from orla_lg.mappers.fit import (
    Goal,
    Repeat,
    Scores,
    Table,
    cross_validate,
    leave_one_out,
    mean_and_spread,
    model_of,
    score,
    train,
)
from orla_lg.mappers.learned import Endpoint, Model, embedding_of, load

LABELS = {"simple": False, "complex": True}
FEWEST_ROWS, FEWEST_OF_A_LABEL = 20, 10
EMBED_TIMEOUT_S = 60.0

FIT = """\
Learn from labelled prompts which are simple and which are complex, and write one file for LearnedMapper.

FILE is JSONL, one prompt a line:

  {"prompt": "What are your opening hours?", "label": "simple"}
  {"prompt": "Reconcile these two invoices ...", "label": "complex"}

`complex` is what your light model gets wrong and your heavy one right. Optional: "system" (text of the system
prompt), "turns" (user messages so far), "tools" and "json_schema" (true or false); other fields are left alone. At
least 20 rows, 10 different texts of each label; a few hundred are better, from the stages the mapper is for. Texts
that are nearly the same count once, and stay together when rows are parted.

Features, penalty, calibration and threshold are chosen inside each fold, so the table at the end tells what the
mapper does with prompts it has not seen. The file keeps no prompt.
"""
FIT_EXAMPLES = """\
examples:
  orla-lg mapper fit prompts.jsonl --out mapper.json
  orla-lg mapper fit prompts.jsonl --out mapper.json --quality 0.9        catch 90 % of the complex ones, cheaply
  orla-lg mapper fit prompts.jsonl --out mapper.json --cost 0.4 --light-price 0.1
  orla-lg mapper fit prompts.jsonl --out mapper.json --group-by source    also try sources it was not trained on
  orla-lg mapper fit prompts.jsonl --out mapper.json --features embedding --url http://127.0.0.1:8003/v1 --model emb
"""
SHOW = "Print what a mapper file holds: how it was trained, what to expect of it, which features weigh most."
TRY = "Print the probability that PROMPT is complex, where it would go, and which features said so. '-' reads stdin."


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the data."""

    prompt: UserPrompt
    label: bool
    group: str


# The command line -----------------------------------------------------------------------------------------


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``mapper`` with its own commands to the top parser's *subparsers*."""
    mapper = subparsers.add_parser("mapper", help="a stage mapper learned from your own labelled prompts")
    commands = mapper.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _fit_options(_command(commands, "fit", "learn from labelled prompts", FIT, fit, FIT_EXAMPLES))
    show_ = _command(commands, "show", "print what a mapper file holds", SHOW, show)
    show_.add_argument("file", type=Path, metavar="FILE")
    show_.add_argument("--json", action="store_true", help="print the file's figures as JSON")
    try_ = _command(commands, "try", "print what a mapper says of a prompt", TRY, attempt)
    try_.add_argument("file", type=Path, metavar="FILE")
    try_.add_argument("prompt", metavar="PROMPT")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
    epilog: str = "",
) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=layout)
    command.set_defaults(run=run)
    return command


def _fit_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="labelled prompts, JSONL")
    add("--out", type=Path, required=True, metavar="FILE", help="where the mapper is written")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--quality", type=_share, metavar="Q", help="catch at least this share of complex prompts")
    wanted.add_argument("--light-share", type=_share, metavar="S", help="send this share of all prompts to light")
    wanted.add_argument("--cost", type=_share, metavar="C", help="spend at most this share of what all-heavy costs")
    add("--light-price", type=_share, default=0.1, metavar="P", help="a light call as a share of a heavy one (0.1)")
    add("--features", choices=("cheap", "embedding"), default="cheap", help="embedding asks --url as well (cheap)")
    add("--url", metavar="URL", help="OpenAI-compatible base of an engine that serves embeddings")
    add("--model", default="default", metavar="NAME", help="the embedding model's name there (default)")
    add("--folds", type=_at_least(2), default=10, metavar="N", help="of cross-validation (10)")
    add("--repeats", type=_at_least(1), default=5, metavar="N", help="of cross-validation, shuffled anew (5)")
    add("--calibration", choices=("auto", "platt", "isotonic"), default="auto", help="auto: isotonic from 1000 rows")
    add("--group-by", metavar="FIELD", help="also leave out each value of this field in turn")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a share from 0 to 1")
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number, {least} or more")
        return int(text)

    return read


# The data -------------------------------------------------------------------------------------------------


def read_rows(file: Path, group_by: str | None = None) -> list[Row]:
    """Read labelled prompts.

    Raises:
        ConfigError: The file cannot be read, a line is wrong (with its number), or there are too few.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    # Only "\n" ends a line of JSONL; str.splitlines would also cut at separators inside a prompt.
    lines = ((f"{file}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    rows = [_row(where, line, group_by) for where, line in lines]
    complex_ = sum(row.label for row in rows)
    has, needs = (
        f"{file} has {len(rows) - complex_} simple and {complex_} complex prompts",
        f"it needs {FEWEST_ROWS} at least, {FEWEST_OF_A_LABEL} of each",
    )
    if len(rows) < FEWEST_ROWS or min(complex_, len(rows) - complex_) < FEWEST_OF_A_LABEL:
        raise ConfigError(f"{has}; {needs}")
    texts = _different(rows)
    if min(texts) < FEWEST_OF_A_LABEL:
        raise ConfigError(
            f"{has}, but only {texts[0]} simple and {texts[1]} complex ones are different texts: the others say "
            f"nearly the same as one of these. What a mapper does with such copies tells nothing of other "
            f"prompts; {needs}, all different"
        )
    return rows


def _different(rows: Sequence[Row]) -> tuple[int, int]:
    """Return how many different texts are simple, and how many complex."""
    return different(near_duplicates([row.prompt.text for row in rows]), [row.label for row in rows])


def _row(where: str, line: str, group_by: str | None) -> Row:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: no JSON: {error}") from error
    if not isinstance(given, dict) or not isinstance(text := given.get("prompt"), str) or not text.strip():
        raise ConfigError(f"{where}: expected an object with 'prompt', a text that is not empty")
    label = given.get("label")
    if not isinstance(label, str) or label not in LABELS:
        raise ConfigError(f"{where}: 'label' is {label!r}; it must be 'simple' or 'complex'")
    if group_by is not None and group_by not in given:
        raise ConfigError(f"{where}: there is no {group_by!r}, which --group-by names")
    return Row(_prompt(where, text, given), LABELS[label], str(given[group_by]) if group_by is not None else "")


def _prompt(where: str, text: str, given: Mapping[str, Any]) -> UserPrompt:
    system, turns = given.get("system", ""), given.get("turns", 1)
    flags = [given.get("tools", False), given.get("json_schema", False)]
    if not isinstance(system, str):
        raise ConfigError(f"{where}: 'system' must be a text")
    if type(turns) is not int or turns < 1:
        raise ConfigError(f"{where}: 'turns' is {turns!r}; it must be a whole number, 1 or more")
    if not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError(f"{where}: 'tools' and 'json_schema' must be true or false")
    return UserPrompt(text, len(system), turns, *flags)


def embed(endpoint: Endpoint, texts: Iterable[str], tell: Callable[[int], None]) -> Iterator[list[float]]:
    """Yield the embedding of each text; *tell* hears how many are done.

    Raises:
        ConfigError: The engine does not answer, or not with a vector.
    """
    url = f"{endpoint.url.rstrip('/')}/embeddings"
    with httpx.Client(timeout=EMBED_TIMEOUT_S) as http:
        for done, text in enumerate(texts, 1):
            try:
                response = http.post(url, json={"model": endpoint.model, "input": sendable(text)})
            except httpx.HTTPError as error:
                raise ConfigError(f"{url} gives no embeddings: {type(error).__name__}: {error}") from error
            yield embedding_of(response)
            tell(done)


# fit ------------------------------------------------------------------------------------------------------


def fit(args: argparse.Namespace) -> int:
    """Fit, write the file, print what it does with prompts it has not seen."""
    goal = Goal(args.quality, args.light_share, args.cost, args.light_price)
    rows = read_rows(args.file, args.group_by)
    labels, groups = [row.label for row in rows], [row.group for row in rows]
    if (fewest := min(_different(rows))) < args.folds:
        raise ConfigError(f"--folds {args.folds}: the rarer label has {fewest} different prompts, fewer than that")
    table, endpoint = _table(args, rows)
    passes = cross_validate(
        table,
        goal,
        folds=args.folds,
        repeats=args.repeats,
        calibration=args.calibration,
        progress=lambda done, total: _progress(f"cross-validation {done}/{total}", last=done == total),
    )
    alone = leave_one_out(table, goal, groups, calibration=args.calibration) if len(set(groups)) > 1 else None
    trained = train(table, _all_rows(table), goal, calibration=args.calibration)
    figures = [score(one.probable, one.sent, labels, goal.light_price) for one in passes]
    kept = {name: mean_and_spread([getattr(one, name) for one in figures]) for name in asdict(figures[0])}
    how = {"rows": len(rows), "complex": sum(labels), "features": args.features, **asdict(trained.candidate)}
    how |= {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "folds": args.folds, "repeats": args.repeats}
    validated = {name: {"mean": mean, "sd": spread} for name, (mean, spread) in kept.items()}
    model = model_of(table, trained, goal, endpoint, trained=how, cross_validated=validated)
    model.save(args.out)
    print(_fitted(model, args.out, [row.prompt for row in rows], labels, goal.light_price))
    if alone is not None:
        print(_by_group(alone, labels, groups, goal.light_price))
    print(
        "".join(f"\n{note}" for note in of_the_data(table.groups.tolist(), labels, args.folds, kept["accuracy"][0])),
        end="",
    )
    return 0


def _all_rows(table: Table) -> Any:
    return (table.y >= 0).nonzero()[0]


def _table(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[Table, Endpoint | None]:
    prompts, labels = [row.prompt for row in rows], [row.label for row in rows]
    if args.features == "cheap":
        return Table(prompts, labels), None
    if not args.url:
        raise ConfigError("--features embedding needs --url, the base URL of an engine that serves embeddings")
    endpoint = Endpoint(args.url, args.model)

    def tell(done: int) -> None:
        _progress(f"embedding {done}/{len(rows)}", last=done == len(rows))

    vectors = list(embed(endpoint, (prompt.text for prompt in prompts), tell))
    if len({len(vector) for vector in vectors}) != 1:
        raise ConfigError(f"{args.url} gives embeddings of different lengths")
    return Table(prompts, labels, vectors), endpoint


def _progress(text: str, *, last: bool) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)


# What is printed ------------------------------------------------------------------------------------------

COLUMNS = ("accuracy", "to light", "cost", "quality")


def simple_ways(
    prompts: Sequence[UserPrompt], labels: Sequence[bool], light_share: float, price: float
) -> dict[str, Scores]:
    """Return the ways of sending that need no learning, the length threshold being the best on this very data."""
    count, flat = len(labels), [0.5] * len(labels)
    dice = random.Random(0)
    drawn = [[dice.random() >= light_share for _ in labels] for _ in range(200)]
    by_chance = [score(flat, sent, labels, price) for sent in drawn]
    lengths = [len(prompt.text) for prompt in prompts]
    most = max(lengths) + 1
    cuts = ([length >= cut for length in lengths] for cut in sorted(set(lengths)))
    best = max(cuts, key=lambda sent: sum(went == label for went, label in zip(sent, labels, strict=True)))
    mean = {name: mean_and_spread([getattr(one, name) for one in by_chance])[0] for name in asdict(by_chance[0])}
    return {
        "all light": score(flat, [False] * count, labels, price),
        "all heavy": score(flat, [True] * count, labels, price),
        "random, same light share": Scores(**mean),
        "longest to heavy": score([length / most for length in lengths], best, labels, price),
    }


def _fitted(model: Model, out: Path, prompts: Sequence[UserPrompt], labels: Sequence[bool], price: float) -> str:
    validated, how = model.cross_validated, model.trained
    share = validated["light_share"]["mean"]
    lines = [f"{'':26}" + "".join(f"{name:>16}" for name in COLUMNS)]
    for name, found in simple_ways(prompts, labels, share, price).items():
        cells = (found.accuracy, found.light_share, found.cost, found.quality)
        lines.append(f"{name:26}" + "".join(f"{cell:>16.3f}" for cell in cells))
    learned = [validated[name] for name in ("accuracy", "light_share", "cost", "quality")]
    lines.append(f"{'learned, unseen prompts':26}" + "".join(f"{c['mean']:>8.3f} ± {c['sd']:.3f}" for c in learned))
    lines += [
        "",
        f"AUC {validated['auc']['mean']:.3f}, Brier {validated['brier']['mean']:.3f}, "
        f"calibration error {validated['ece']['mean']:.3f}; {how['repeats']} × {how['folds']}-fold, ± over repeats",
        f"threshold {model.threshold:.3f} for {model.expected['wanted']}: {_expected(model)}",
        f"written: {out}",
    ]
    if validated["auc"]["mean"] < 0.55:
        lines.append("Careful: this data does not tell simple from complex. More rows, or better labels, are needed.")
    return "\n".join(lines)


def _expected(model: Model) -> str:
    found = model.expected
    return (
        f"expect {found['light_share']:.0%} to light, {found['complex_caught']:.0%} of complex caught, "
        f"cost {found['cost']:.2f} of all heavy"
    )


def _by_group(alone: Repeat, labels: Sequence[bool], groups: Sequence[str], price: float) -> str:
    lines = ["", f"{'left out in training':26}{'prompts':>16}{'accuracy':>16}{'to light':>16}"]
    for group in [*sorted(set(groups)), ""]:
        rows = [n for n, one in enumerate(groups) if not group or one == group]
        probable, sent = [alone.probable[n] for n in rows], [alone.sent[n] for n in rows]
        found = score(probable, sent, [labels[n] for n in rows], price)
        lines.append(f"{group or 'together':26}{len(rows):>16}{found.accuracy:>16.3f}{found.light_share:>16.3f}")
    return "\n".join(lines)


def show(args: argparse.Namespace) -> int:
    """Print what a file holds."""
    model = load(args.file)
    if args.json:
        fields = model.asdict()
        print(
            json.dumps(
                {key: fields[key] for key in ("trained", "expected", "cross_validated", "threshold")}, indent=2
            )
        )
        return 0
    print(*(f"{name:12} {value}" for name, value in model.trained.items()), sep="\n")
    if model.endpoint is not None:
        print(f"{'embeddings':12} {len(model.embedding)} numbers from {model.endpoint.model} at {model.endpoint.url}")
    for name, found in model.cross_validated.items():
        print(f"{name:14} {found['mean']:.3f} ± {found['sd']:.3f}, cross-validated")
    if model.expected:
        print(f"threshold {model.threshold:.3f} for {model.expected['wanted']}: {_expected(model)}")
    weights = [
        weight * spread for weight, spread in zip(model.dense, model.spread or [1.0] * len(DENSE), strict=True)
    ]
    print("\nwhat weighs most (+ complex, - simple; logits per standard deviation)")
    print(*_heaviest(dict(zip(DENSE, weights, strict=True)), 12), sep="\n")
    return 0


def _heaviest(weights: Mapping[str, float], count: int) -> list[str]:
    heaviest = sorted(weights, key=lambda name: -abs(weights[name]))[:count]
    return [f"  {weights[name]:+.3f}  {name}" for name in heaviest if weights[name]]


def attempt(args: argparse.Namespace) -> int:
    """Print what a mapper says of one prompt."""
    from orla_lg.mappers.features import features

    model = load(args.file)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    vector = next(embed(model.endpoint, [text], lambda done: None)) if model.endpoint else []
    if len(vector) != len(model.embedding):
        raise ConfigError(f"the engine's embedding has {len(vector)} numbers, the mapper's {len(model.embedding)}")
    prompt = UserPrompt(text)
    found = model.probability(prompt, vector)
    where = "complex" if found >= model.threshold else "simple"
    print(f"{where}: complex with probability {found:.3f}, threshold {model.threshold:.3f}")
    values, _ = features(prompt, 0)
    shares = {name: w * value for name, w, value in zip(DENSE, model.dense, values, strict=True)}
    print(f"what counts most (+ complex, - simple; without any of it the score is {model.intercept:+.3f})")
    print(*_heaviest(shares, 6), sep="\n")
    return 0
