"""Ids, and names for environments whose user gave none."""

from __future__ import annotations

import secrets

ID_CHARACTERS = 16

_QUALITIES = (
    "able amber apt arctic bold brave brief bright brisk calm candid clear clever cosy crisp deft eager early easy "
    "exact fair fine firm fleet fond frank fresh gentle glad golden grand handy happy hardy honest humble jolly keen "
    "kind light lively loyal lucid lucky mellow merry mild modest neat nimble noble novel open patient plain polite "
    "prime proud quick quiet ready robust round rustic sage sharp silent silver simple sleek smart snug sober solid "
    "sound spare spry steady still stout sunny sure swift tidy tough trim true vivid warm wise witty zesty"
).split()
_BIRDS = (
    "auk avocet bittern bunting bustard buzzard chough coot cormorant crake crane crow cuckoo curlew dipper dotterel "
    "dove duck dunlin dunnock eagle egret eider falcon finch fulmar gannet godwit goldcrest goose grebe grouse gull "
    "harrier hawk heron hobby hoopoe ibis jackdaw jay kestrel kingfisher kite knot lapwing lark linnet magpie martin "
    "merlin moorhen nightjar nuthatch oriole osprey ouzel owl partridge petrel pipit plover pochard puffin quail rail "
    "raven redstart robin rook ruff sandpiper shrike siskin skua smew snipe sparrow starling stilt stork swallow swan "
    "swift teal tern thrush tit turnstone twite wagtail warbler whimbrel wigeon wren yaffle"
).split()


def new_id() -> str:
    return secrets.token_hex(ID_CHARACTERS // 2)


def new_name() -> str:
    return f"{secrets.choice(_QUALITIES)}_{secrets.choice(_BIRDS)}"
