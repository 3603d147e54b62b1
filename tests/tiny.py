from taut.contract.tiny import *  # noqa: F403
