from orchestrator.api.calls import compose as compose
from orchestrator.api.calls import load as load
from orchestrator.api.calls import plan as plan
from orchestrator.api.calls import resume as resume
from orchestrator.api.calls import run as run
from orchestrator.api.calls import status as status

__version__: str
API: tuple[str, ...]
