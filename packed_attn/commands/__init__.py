"""One file per command of `packed-attn`.

Each offers `add(commands)`, which describes its arguments, and `run(args)`, which returns its exit
status. Importing one loads nothing heavy: `run` imports what it needs.
"""
