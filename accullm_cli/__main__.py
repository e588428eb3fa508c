"""`python -m accullm_cli` is `accullm`."""

from accullm_cli.cli import main

if __name__ == "__main__":
    main()
