"""`optimum-cli rmtkd ...`: options, printing and exit codes. What the commands do lives in the other rooms.

Nothing heavy is imported here at module level: `optimum-cli` reads these modules at every start, whatever the command.
"""
