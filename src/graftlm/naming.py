"""Whether this process knows GraftLM by the name `peft`: where it does, a wrapper's levels are HF PEFT's."""

under_peft = False  # `as_peft` sets it
