"""Make docs/cli.md from the commands themselves; with --check, exit 1 if the file is stale."""

import html
import os
import subprocess
import sys
from pathlib import Path

CLI = Path(__file__).parent / "cli.md"
HEAD = """<!-- Made by `python docs/make_cli.py` from distill_cli/cli/; edit the help texts there, not this file. -->

> Made by `python docs/make_cli.py`. Every command is one function of the package and prints what it returns:
> `distill_cli.teacher_logits.teacher_logits`, `distill_cli.train.train`, `distill_cli.evaluate.evaluate`,
> `distill_cli.quickstart.quickstart`, `distill_cli.doctor.examine`, `distill_cli.bench.bench_data`. `-h` is `--help`.
> Exit codes: [errors.md](errors.md). What `--set` reaches: [recipes.md](recipes.md).

"""


def main(check: bool) -> None:
    command = [sys.executable, "-m", "typer", "distill_cli.cli", "utils", "docs", "--name", "distill"]
    # What a terminal or a CI service says of itself must not change the text.
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "PYTHONUTF8": "1", "TYPER_USE_RICH": "1"}
    done = subprocess.run(command, cwd=CLI.parents[1], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    text = HEAD + html.unescape(done.stdout).strip() + "\n"
    if not check:
        CLI.write_text(text, encoding="utf-8")
    elif not CLI.exists() or CLI.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md: is stale; run python docs/make_cli.py")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
