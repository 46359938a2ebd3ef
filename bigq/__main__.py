"""`python -m bigq`: the same as the command `bigq`."""

from bigq.cli.app import main

if __name__ == "__main__":
    main()
