"""`python -m fastrank` is the `fastrank` command."""

from fastrank.cli import main

if __name__ == "__main__":
    main()
