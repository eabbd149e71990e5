"""The tutorial's script: blocks run in order, what they print replaces what is shown, and ports stay the page's."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import tutorial

PAGE = """\
```bash
cd a-folder
```

```bash
orla-lg --version
```

```console
stale
```

```python
port = "http://127.0.0.1:8001/v1"
print(port, 18001)
```

```text
```

```toml
name = "8001"
```

```python
print(open("orla.toml").read())
```

Not at once:

```text
kept
```
"""


def test_a_page_is_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "in_shell", lambda lines: f"ran {lines}  \n")
    written = tutorial.run(PAGE, {"8001": "4711"})
    assert Path("orla.toml").read_text() == 'name = "4711"\n'
    assert written == PAGE.replace("stale", "ran orla-lg --version").replace(
        "```text\n```", "```text\nhttp://127.0.0.1:8001/v1 18001\n```"
    )


def test_commands_run_in_a_shell_and_a_fault_ends_the_page() -> None:
    assert tutorial.in_shell("echo '[  3 s] loading'\necho ready\n") == "ready\n"
    with pytest.raises(RuntimeError, match="exit 3"):
        tutorial.in_shell("exit 3")


def test_the_tutorial_shows_what_every_command_prints() -> None:
    page = tutorial.PAGE.read_text(encoding="utf-8")
    blocks = [(block[1], block[2]) for block in tutorial._BLOCK.finditer(page)]
    assert not [language for language, code in blocks if language in tutorial.SHOWN and not code.strip()]
