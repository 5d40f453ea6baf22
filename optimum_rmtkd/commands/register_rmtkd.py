# The door of optimum-cli: the build puts this file into the namespace folder optimum/commands/register
# (pyproject.toml), the only place where optimum looks for the commands of third parties. It must stay light and must
# not use relative imports.
from optimum_rmtkd.commands.cli import RMTKDCommand


REGISTER_COMMANDS = [RMTKDCommand]
