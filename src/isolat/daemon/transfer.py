"""The daemon's verbs on registries (docs/api.md)."""

from __future__ import annotations

from isolat.daemon.call import Answer, Call
from isolat.errors import UsageError
from isolat.images.oci import Platform, parse_platform
from isolat.images.reference import parse_reference
from isolat.images.registries import pulling, pushing
from isolat.images.registries.flights import Passenger
from isolat.images.registries.skopeo import Access


def pull(call: Call) -> Answer:
    reference = parse_reference(call.args.text("image"))
    wanted = pulling.wanted(reference, _platform(call), _access(call))
    return call.engine.puller.pull(wanted, _passenger(call)).to_json()


def push(call: Call) -> Answer:
    name = call.args.text("image")
    target = parse_reference(call.args.text("target", "") or name)
    image = call.engine.images.resolve(name)
    digest = pushing.push(call.engine.images, image, target, _access(call), _passenger(call))
    return {"name": target.name, "digest": digest}


def _passenger(call: Call) -> Passenger:
    def progress(text: str, done: int, total: int) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    return Passenger(progress, call.gone)


def _platform(call: Call) -> Platform | None:
    text = call.args.text("platform", "")
    found = parse_platform(text) if text else None
    if text and found is None:
        raise UsageError(f"platform: {text!r} is none", hint="OS/ARCHITECTURE[/VARIANT]: linux/arm64/v8")
    return found


def _access(call: Call) -> Access:
    auths = call.args.mapping("auths") if call.args.raw("auths", None) is not None else {}
    verify = call.args.raw("tls_verify", None)
    if verify is not None and not isinstance(verify, bool):
        raise UsageError("tls_verify must be true or false")
    return Access(verify, auths)
