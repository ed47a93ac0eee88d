"""Who may come in: authentication of every route, as FastAPI dependencies. Hop 1 of a turn; knows no engine and no Ray.

    user       any valid key                     completions, models, sessions
    operator   a valid key with role `operator`  /v1/autopilot, /observe
    metrics    as operator, unless `open_metrics` leaves the page to an in-cluster scraper

    @api.get("/v1/autopilot", dependencies=[Depends(doors.operator)])

Without a keys file every door is open, and the tenant is what the header of a trusted gateway says. With one, the tenant is the key's; a
tenant header that names another one is refused, because ignoring it would file the conversation where the sender does not look for it.
"""

from pathlib import Path

from fastapi import Request

from deploy.errors import InvalidKey, NotAllowed
from deploy.keys import Caller, KeyRing, Role
from deploy.settings import DeploySettings
from loopserve.errors import InvalidRequest

_TENANT_CHARS_MAX = 256
_MISSING = "No API key was sent; send one as `Authorization: Bearer <key>` or `x-api-key: <key>`."
_WRONG = "The API key is not valid here; ask the operator of this server for another one."


class Doors:
    """The doors of one ingress process."""

    def __init__(self, settings: DeploySettings) -> None:
        """Raises ConfigError for a keys file that cannot be read."""
        self._tenant_header = settings.tenant_header
        self._open_metrics = settings.open_metrics
        self._keyring = KeyRing(Path(settings.keys_file)) if settings.keys_file else None

    @property
    def keys_reload_failed(self) -> bool:
        """Whether the keys file has changed into something that cannot be read; the keys before stay in force."""
        return self._keyring is not None and self._keyring.reload_failed

    async def user(self, request: Request) -> Caller:
        """Who sent the request. Raises InvalidKey, or InvalidRequest for a tenant header that is not the key's."""
        named = request.headers.get(self._tenant_header, "").strip()
        if self._keyring is None:
            return Caller(_checked_tenant(named), "", Role.OPERATOR)
        self._keyring.refresh()
        key = _presented(request)
        if not key:
            raise InvalidKey(_MISSING)
        entry = self._keyring.find(key)
        if entry is None:
            raise InvalidKey(_WRONG)
        if named and named != entry.tenant:
            raise InvalidRequest(
                f"The header {self._tenant_header} names another tenant than the API key belongs to; leave the header out."
            )
        return entry.caller()

    async def operator(self, request: Request) -> Caller:
        """Who sent the request, if an operator did. Raises as `user` does, and NotAllowed."""
        caller = await self.user(request)
        if caller.role is not Role.OPERATOR:
            raise NotAllowed(f"{request.url.path} needs an API key with the role `operator`.")
        return caller

    async def metrics(self, request: Request) -> None:
        """Let scrapers in: operators, or anybody where `open_metrics` is set. Raises as `operator` does."""
        if not self._open_metrics:
            await self.operator(request)
        elif self._keyring is not None:
            self._keyring.refresh()  # so that the gauge is true without any other traffic


def _presented(request: Request) -> str:
    """The key of a request; "" where there is none. Another scheme than Bearer belongs to a proxy in front."""
    scheme, _, key = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("x-api-key", "").strip()


def _checked_tenant(tenant: str) -> str:
    """A tenant as a gateway names it. Control characters would let it look like another tenant's cache salt."""
    if len(tenant) > _TENANT_CHARS_MAX or not tenant.isprintable():
        raise InvalidRequest(f"A tenant's name has at most {_TENANT_CHARS_MAX} characters, all of them printable.")
    return tenant
