"""Placeholder until its builder's first commit."""

import typer


def register(app: typer.Typer) -> None:
    pass
