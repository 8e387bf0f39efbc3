"""`python -m shardembed` is the console script `shardembed`."""

from shardembed.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
