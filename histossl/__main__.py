"""`python -m histossl` is `histossl`."""

from histossl.cli import entry

if __name__ == "__main__":
    entry()
