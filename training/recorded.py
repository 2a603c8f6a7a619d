"""The kinds of recorded options, by their declarations: in training_options.json and in training states."""

from __future__ import annotations

from dataclasses import fields, replace

from dnnlib import schema
from dnnlib.options import Option, options_of
from training import run_schema
from training.config import RunConfig
from training.objectives import OBJECTIVES


def kind_of_record() -> schema.Record:
    """The kind of a run's configuration, as training_options.json and states hold it."""
    # Options of every run.
    found = {option.key: kind(option) for option in options_of(RunConfig).values() if option.key}
    groups = {
        group: schema.Maybe(
            schema.Record(
                {key.partition('.')[2]: k for key, k in found.items() if key.startswith(group + '.')}
            )
        )
        for group in ('validation', 'wandb')
    }

    # Options of the objectives, of which any may have made the record.
    own, sampling = {}, {}
    for objective in OBJECTIVES.values():
        config = objective.config
        for name, option in options_of(config).items():
            if option.key or not option.record:
                continue
            table = sampling if name in config.sampling else own
            # None is allowed if it is the default of one objective.
            if not isinstance(table.get(name), schema.Maybe):
                table[name] = kind(option)
        for field in fields(config):
            if 'recorded' in field.metadata:
                table = sampling if field.name in config.sampling else own
                table[field.name] = field.metadata['recorded']
    plain = {key: k for key, k in found.items() if '.' not in key}
    known = dict(
        loss=schema.Record(dict(own, kind=run_schema.NAME)), sampling=schema.Maybe(schema.Record(sampling))
    )
    return replace(run_schema.OPTIONS, fields={**plain, **run_schema.OPTIONS.fields, **groups, **known})


def kind(option: Option) -> schema.Kind:
    """The kind of an option's recorded value."""
    of_value = option.schema()
    if option.unit != 1:
        of_value = schema.Real(of_value.low * option.unit, of_value.high * option.unit)
    return schema.Maybe(of_value) if option.default is None and not option.settled else of_value


RECORDED = kind_of_record()
STAGE = replace(RECORDED, required=[*RECORDED.required, 'stages', 'teacher_digest'])
