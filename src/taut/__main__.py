"""``python -m taut``: how torchrun and accelerate launch start it."""

from taut.cli import main

if __name__ == "__main__":
    main()
