"""`python -m histossl` is `histossl`."""


def start() -> None:
    try:
        from histossl.cli import entry
    except KeyboardInterrupt:  # Ctrl-C in its first moment, before the commands are there to take it
        raise SystemExit(130) from None
    entry()


if __name__ == "__main__":
    start()
