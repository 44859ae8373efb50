"""Options that several commands have, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the job file.")
]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="Admit a task module:attr from MODULE or below it, which runs its code."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
