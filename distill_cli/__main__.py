"""`python -m distill_cli`, which is how torchrun and machines without the console script start it."""

from distill_cli.cli import main

if __name__ == "__main__":
    main()
