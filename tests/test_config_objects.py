"""Policies, memory and mappers of the user's own, named in ``orla.toml`` as ``"module:name"``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orla_lg import ConfigError, Orla, config

URL = "http://127.0.0.1:9/v1"
MODULE = "own_of_a_configuration"
CODE = """
from orla_lg import Assignment


class Newest:
    def key(self, head, now):
        return (-head.order,)


newest = Newest()


class Kept:
    def decide(self, event):
        return []


class Pool:
    class light:
        def map(self, call, backends):
            return Assignment("light", mapper="own")


def made():
    return Pool.light()


def failing():
    raise LookupError("no table")


class Needs:
    def __init__(self, more):
        pass


number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / f"{MODULE}.py").write_text(CODE)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in [each for each in sys.modules if each.startswith(MODULE)]:
        del sys.modules[name]


def file_with(folder: Path, top: str, more: str = "") -> Path:
    file = folder / "orla.toml"
    backends = "".join(f'[backends.{name}]\nurl = "{URL}"\n' for name in ("light", "heavy"))
    file.write_text(f"{top.replace('own:', MODULE + ':')}\n{backends}{more.replace('own:', MODULE + ':')}")
    return file


def test_each_kind_may_be_named(folder: Path) -> None:
    top = 'stage_policy = { light = "own:newest", "*" = "fair" }\nrequest_policy = "own:Newest"\n'
    more = '[variants]\nother = "own:Pool.light"\nplain = { "*" = "heavy" }\n'
    file = file_with(folder, top + 'memory = "own:Kept"\nmapping = "own:made"', more)
    with Orla.from_config(file) as orla:
        serving = orla.core.serving
        policies = {name: scheduler.queue.policies for name, scheduler in serving.schedulers.items()}
        assert type(policies["light"].stage).__name__ == "Newest" and type(policies["heavy"].stage).__name__ == "Fair"
        assert policies["light"].requests["*"] is policies["heavy"].requests["*"]
        assert type(serving.mappings.shared).__name__ == "light"
        assert set(serving.mappings.variants) == {"other", "plain"}


def test_one_name_is_one_object_for_both_levels(folder: Path) -> None:
    settings = config.load(file_with(folder, 'stage_policy = "own:Newest"\nrequest_policy = { a = "own:Newest" }'))
    assert isinstance(settings.request_policy, dict)
    assert settings.stage_policy is settings.request_policy["a"]
    both = config.load(file_with(folder, 'policy = "own:Newest"'))
    assert both.policy is not settings.stage_policy, "another reading, another object"


def test_a_mapper_of_ones_own_may_be_load_aware(folder: Path) -> None:
    with Orla.from_config(file_with(folder, 'load_aware = true\nmapping = "own:made"')) as orla:
        assert type(orla.core.serving.mappings.shared).__name__ == "LoadAware"


WRONG = {
    'policy = "own:gone"': rf"policy = '{MODULE}:gone': {MODULE} has no 'gone'",
    'policy = "own:newes"': "did you mean 'newest'",
    'policy = "own:number"': "policy = .*number.*: 3 is no scheduling policy: it needs key",
    'policy = "own:failing"': "failing\\(\\) failed: LookupError: no table",
    'policy = "own:Needs"': "Needs\\(\\) failed: TypeError: .*more",
    'policy = "no_such_module_anywhere:x"': "no_such_module_anywhere cannot be imported .*ModuleNotFoundError",
    'policy = "a b:c"': 'policy = .*: expected "module:name"',
    'policy = "own:"': 'policy = .*: expected "module:name"',
    'stage_policy = { heavy = "own:gone" }': r"stage_policy\.heavy = ",
    'request_policy = { a = "own:gone" }': r"request_policy\.a = ",
    'memory = "own:newest"': "memory = .*is no memory policy: it needs decide",
    'memory = 3': "memory: found 3; it must be the name of a memory policy",
    'mapping = "own:newest"': "mapping = .*is no stage mapper",
    'mapping = "light"': "mapping: found 'light'; it must be a table of backends by stage, or",
    'mapping = 3': "mapping: found 3",
}  # fmt: skip


@pytest.mark.parametrize("top", WRONG)
def test_a_fault_names_file_and_key(top: str, folder: Path) -> None:
    file = file_with(folder, top)
    with pytest.raises(ConfigError, match=rf"(?s)orla\.toml: {'' if top[0] == 'p' else '.*'}.*{WRONG[top]}"):
        Orla.from_config(file)


def test_all_faults_are_named_at_once(folder: Path) -> None:
    top = 'policy = "own:gone"\nmemory = "own:number"\nkeep_records = 0'
    with pytest.raises(ConfigError) as raised:
        Orla.from_config(file_with(folder, top, '[variants]\nother = "own:missing"\n'))
    assert all(key in str(raised.value) for key in ("policy = ", "memory = ", "keep_records: ", "variants.other = "))


def test_a_module_that_fails_is_named(folder: Path) -> None:
    (folder / f"{MODULE}_broken.py").write_text("import this_is_not_there\n")
    (folder / f"{MODULE}_raises.py").write_text("raise RuntimeError('at import')\n")
    for name, said in (("broken", "cannot be imported"), ("raises", "failed when it was imported.*at import")):
        with pytest.raises(ConfigError, match=f"policy = .*{said}"):
            config.load(file_with(folder, f'policy = "{MODULE}_{name}:x"'))


def test_another_modules_name_is_no_mistake_that_goes_unseen(folder: Path, tmp_path: Path) -> None:
    """A file beside the configuration, and a module of its name that is loaded already: which is meant?"""
    (folder / "json.py").write_text("class Newest: pass\n")
    with pytest.raises(ConfigError, match="a module 'json' is loaded already"):
        config.load(file_with(folder, 'policy = "json:Newest"'))


def test_only_a_server_does_without_backends(folder: Path) -> None:
    file = folder / "orla.toml"
    file.write_text("[serve]\ndrain_s = 1\n")
    assert config.load(file).backends == ()
    with pytest.raises(ConfigError, match=r"orla\.toml: backends: missing; only `orla-lg serve` does without"):
        Orla.from_config(file)
    file.write_text("keep_records = 5\n")
    with pytest.raises(ConfigError, match="backends: missing; at least one"):
        config.load(file)
