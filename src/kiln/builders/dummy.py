"""A backend that can build nothing: where kiln only stores, or to see what a refusal looks like."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kiln.build.events import BuilderInfo, BuildEvent, Failure, Finished, Reason, Refusal, Retry, UnmetDetail
from kiln.build.model import BuildOptions, BuildRequest
from kiln.build.service import BuildService, Capabilities
from kiln.version import __version__

_URL = "dummy://"


class DummyBuilder(BuildService):
    """Answers `unsatisfiable` to everything."""

    def __init__(self, castore_scheme: str) -> None:
        self._castore_scheme = castore_scheme
        self._info = BuilderInfo(worker="dummy", url=_URL, version=__version__)

    async def capabilities(self) -> Capabilities:
        return Capabilities(builders=(self._info,), castore_scheme=self._castore_scheme, version=__version__)

    @asynccontextmanager
    async def build(self, request: BuildRequest, options: BuildOptions) -> AsyncIterator[AsyncIterator[BuildEvent]]:
        async def events() -> AsyncIterator[BuildEvent]:
            wanted = request.constraints.system or "any"
            unmet = UnmetDetail((Refusal(_URL, "system", wanted, "none"),))
            said = "the builder dummy:// builds nothing; choose another one with --builder"
            yield Finished(Failure(Reason.UNSATISFIABLE, said, Retry.ELSEWHERE, unmet), builder=self._info)

        del options
        yield events()
