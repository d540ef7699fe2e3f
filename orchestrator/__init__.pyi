from orchestrator.api import compose as compose
from orchestrator.api import load as load
from orchestrator.api import plan as plan
from orchestrator.api import resume as resume
from orchestrator.api import run as run
from orchestrator.api import status as status

__version__: str
API: tuple[str, ...]
