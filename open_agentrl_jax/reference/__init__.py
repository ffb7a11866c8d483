"""What the published code (Gen-Verse/Open-AgentRL) computes where it differs from the paper, faults included.

Nothing here is used unless `behaviour=reference` is chosen; `behaviour.py` is the list. Only code that wires a run, and
the graders' `mode=` argument, import this package.
"""
