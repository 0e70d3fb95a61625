"""The daemon's verbs on templates and on what machines are made of."""

from __future__ import annotations

from dataclasses import asdict

from isolat.daemon.call import Answer, Call
from isolat.engine.templates import Template


def _row(template: Template) -> Answer:
    return {"id": template.id, **asdict(template)}


def template_create(call: Call) -> Answer:
    """Make the template of machines like this ``spec``; the one that is there when it was made already."""

    def progress(text: str, done: int = 0, total: int = 0) -> None:
        call.send({"progress": {"text": text, "done": done, "total": total}}, [])

    return _row(call.engine.make_template(call.args.mapping("spec"), progress))


def templates(call: Call) -> Answer:
    return {
        "templates": [_row(template) for template in call.engine.templates.all()],
        "warm": call.engine.warm_count(),
    }


def template_rm(call: Call) -> Answer:
    return _row(call.engine.templates.remove(call.args.text("template")))


def template_prune(call: Call) -> Answer:
    return {"removed": [_row(template) for template in call.engine.prune_templates()]}
