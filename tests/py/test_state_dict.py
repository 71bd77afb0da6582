"""state_dict.py against torch's: the same models, optimizers and options under both."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
import weakref

import pytest
import torch
from ranks import state_dict_models as m
from torch import nn
from torch.distributed.checkpoint import state_dict as theirs

import dcp_native.state_dict as ours

Options = theirs.StateDictOptions

by_name = {"ids": lambda value: getattr(value, "__name__", None) or ",".join(value) or "defaults"}
every_model = pytest.mark.parametrize("make", m.MODELS, **by_name)
# Every pair of model and optimizers, model and options, optimizers and options comes up.
every_pair = pytest.mark.parametrize(
    ("make", "optims", "options"),
    [
        pytest.param(
            make, optims, options, id=f"{make.__name__}-{optims.__name__}-{','.join(options)}"
        )
        for i, make in enumerate(m.MODELS)
        for j, optims in enumerate(m.OPTIMIZERS)
        for options in [m.option_kinds()[(i + j) % len(m.option_kinds())]]
    ],
)
every_option = pytest.mark.parametrize("options", m.option_kinds(), **by_name)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(call, make, optims=None, options=None):
    """What `call(implementation, model, optimizers, options)` gives under torch and under us."""
    results = []
    for implementation in (theirs, ours):
        model = m.build(make)
        made = optims(model) if optims else []
        m.train(made)
        results.append(
            m.outcome(
                lambda i=implementation, x=model, o=made: call(i, x, o, Options(**options or {}))
            )
        )
    return results


def assert_both_same(call, make, optims=None, options=None):
    want, got = both(call, make, optims, options)
    m.same(got, want)
    return want


@every_option
@every_model
def test_model_state_equals_torchs(make, options):
    want = assert_both_same(
        lambda i, model, _, o: i.get_model_state_dict(model, options=o), make, None, options
    )
    assert isinstance(want, dict) and want


@every_pair
def test_optimizer_state_equals_torchs(make, optims, options):
    assert_both_same(
        lambda i, model, o, opt: i.get_optimizer_state_dict(model, o, options=opt),
        make, optims, options,
    )  # fmt: skip


@every_model
def test_model_state_is_the_live_tensors(make):
    model = m.build(make)
    want, got = theirs.get_model_state_dict(model), ours.get_model_state_dict(model)
    if make is not m.overriding and make is not m.hooked:
        assert m.places(got) == m.places(want) and m.places(got)
    m.same(got, want)


def test_optimizer_state_is_the_live_tensors_and_dicts():
    model = m.build(m.plain)
    (optim,) = m.adamw(model)
    m.train([optim])
    want, got = (i.get_optimizer_state_dict(model, optim) for i in (theirs, ours))
    assert m.places(got) == m.places(want)
    for fqn, state in got["state"].items():
        assert state is want["state"][fqn]


@pytest.mark.parametrize("optims", m.OPTIMIZERS, **by_name)
@every_model
def test_fresh_optimizers_get_torchs_state(make, optims):
    results = []
    for implementation in (theirs, ours):
        model = m.build(make)
        made = optims(model)
        state = implementation.get_state_dict(model, made)
        assert all(p.grad is None for p in model.parameters())
        results.append((state, [o.state_dict() for o in made]))
    m.same(results[1], results[0])


def round_trip(i, model, optims, options):
    """Saves, changes everything, loads; returns all that can be seen afterwards."""
    saved = copy.deepcopy(i.get_state_dict(model, optims, options=options))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for optim in optims:
        optim.state.clear()
        for group in optim.param_groups:
            group["lr"] = 77.0
    model_state, optim_state = saved
    keys = i.set_state_dict(
        model, optims, model_state_dict=model_state, optim_state_dict=optim_state, options=options
    )
    return (
        list(keys),
        list(model_state),
        dict(model.named_parameters()),
        dict(model.named_buffers()),
        [o.state_dict() for o in optims],
    )


@every_pair
def test_round_trip_equals_torchs(make, optims, options):
    assert_both_same(round_trip, make, optims, options)


@pytest.mark.parametrize("optims", (m.adamw, m.several, m.in_backward), **by_name)
@every_model
def test_setting_what_was_got_changes_nothing(make, optims):
    model = m.build(make)
    made = optims(model)
    m.train(made)
    before = copy.deepcopy(([p.data for p in model.parameters()], [o.state_dict() for o in made]))
    model_state, optim_state = ours.get_state_dict(model, made)
    ours.set_state_dict(model, made, model_state_dict=model_state, optim_state_dict=optim_state)
    m.same(([p.data for p in model.parameters()], [o.state_dict() for o in made]), before)


@pytest.mark.parametrize("target", (m.plain, m.compiled, m.activation_root), **by_name)
@pytest.mark.parametrize("source", (m.plain, m.compiled, m.activation_root), **by_name)
def test_state_goes_from_any_wrapper_into_any_other(source, target):
    one, two = m.build(source, 1), m.build(target, 2)
    (a,), (b,) = m.adamw(one), m.momentum_in_groups(two)
    b = m.adamw(two)[0]
    m.train([a])
    model_state, optim_state = copy.deepcopy(ours.get_state_dict(one, a))
    ours.set_state_dict(two, b, model_state_dict=dict(model_state), optim_state_dict=optim_state)
    m.same(dict(ours.get_model_state_dict(two)), dict(model_state))
    m.same(ours.get_optimizer_state_dict(two, b), optim_state)


def changed(kind):
    """A set_model_state_dict of a state dict with something wrong in it."""

    def call(i, model, _, options):
        state = {k: v.clone() for k, v in i.get_model_state_dict(model).items()}
        keys = list(state)
        if kind == "missing":
            del state[keys[0]], state[keys[-1]]
        elif kind == "unexpected":
            state |= {"zzz": torch.ones(1), f"{keys[0]}.more": torch.ones(1), "a.b": torch.ones(1)}
        elif kind == "shape":
            state[keys[1]] = torch.ones(7, 7)
        elif kind == "type":
            state[keys[1]] = "text"
        elif kind == "dtype":
            state = {k: v.double() for k, v in state.items()}
        elif kind == "one element":
            state[keys[0]] = torch.ones(1)
        elif kind == "empty":
            state = {}
        result = i.set_model_state_dict(model, state, options=options)
        return list(result), list(state), model.state_dict()

    return call


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize(
    "kind", ("missing", "unexpected", "shape", "type", "dtype", "one element", "empty")
)
@pytest.mark.parametrize(
    "make",
    (m.plain, m.compiled, m.compiled_part, m.activations, m.shared, m.parametrized),
    **by_name,
)
def test_wrong_model_state_is_refused_as_in_torch(make, kind, strict):
    assert_both_same(changed(kind), make, None, {"strict": strict})


def test_a_state_dict_that_was_assigned_once_is_assigned_again_as_in_torch():
    """torch leaves word of it in the metadata of the state dict."""

    def call(i, model, _, options):
        state = i.get_model_state_dict(model)
        m.build(m.plain, 4).load_state_dict(state, assign=True)
        again = m.build(m.plain, 5)
        i.set_model_state_dict(again, state)
        taken = m.places(again.state_dict())
        return [taken[key] == place for key, place in m.places(state).items()], again.state_dict()

    assert all(assert_both_same(call, m.plain)[0])


def test_extra_state_that_is_missing_or_unexpected_is_refused_as_in_torch():
    def lost(i, model, _, options):
        state = i.get_model_state_dict(model)
        del state["0._extra_state"]
        return i.set_model_state_dict(model, state, options=options)

    def added(i, model, _, options):
        state = i.get_model_state_dict(model) | {"0._extra_state": 1}
        return i.set_model_state_dict(model, state, options=options)

    assert "Missing key" in assert_both_same(lost, m.extra)[1]
    assert "Unexpected key" in assert_both_same(added, m.plain)[1]


def broken_optimizer(kind):
    def call(i, model, optims, options):
        state = copy.deepcopy(i.get_optimizer_state_dict(model, optims))
        fqn = next(iter(state["state"]), None)
        if kind == "no state":
            del state["state"][fqn]
        elif kind == "no group":
            del state["param_groups"][0]
        elif kind == "fewer":
            state["param_groups"][0]["params"].pop()
        elif kind == "empty":
            state = {}
        elif kind == "numbered":
            state = optims[0].state_dict()
        elif kind == "cast":
            state["state"][fqn] = {
                k: v.double() if k != "step" else v for k, v in state["state"][fqn].items()
            }
        elif kind == "foreign":
            optims[0].add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        i.set_optimizer_state_dict(model, optims, state, options=options)
        return [o.state_dict() for o in optims]

    return call


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("kind", ("no state", "no group", "fewer", "empty", "numbered", "cast"))
@pytest.mark.parametrize("optims", (m.adamw, m.momentum_in_groups, m.several), **by_name)
def test_wrong_optimizer_state_is_refused_as_in_torch(optims, kind, strict):
    assert_both_same(broken_optimizer(kind), m.plain, optims, {"strict": strict})


def test_parameters_that_are_not_the_models_are_refused():
    for implementation in (theirs, ours):
        model = m.build(m.plain)
        optim = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1, momentum=1)
        with pytest.raises(KeyError):
            implementation.get_optimizer_state_dict(model, optim)


@pytest.mark.parametrize(
    "options", ({"broadcast_from_rank0": True}, {"flatten_optimizer_state_dict": True})
)
def test_refusals_of_options_are_torchs(options):
    class Text(torch.optim.SGD):
        def state_dict(self):
            return {"state": {0: {"x": "text"}}, "param_groups": []}

    assert_both_same(
        lambda i, model, _, o: i.get_optimizer_state_dict(
            model, Text(model.parameters(), lr=1), options=o
        ),
        m.plain, None, options,
    )  # fmt: skip
    assert_both_same(lambda i, model, *_: i.get_optimizer_state_dict(model, []), m.plain)
    assert_both_same(lambda i, *_: i.get_state_dict(nn.ReLU(), []), m.plain)


def test_empty_parameter_groups_are_torchs():
    def groups(first, second):
        def call(i, model, *_):
            p = list(model.parameters())
            sets = {"none": [], "some": p[:3], "rest": p[3:]}
            optim = torch.optim.SGD(
                [{"params": sets[first], "lr": 1.0}, {"params": sets[second], "lr": 2.0}], lr=3.0
            )
            state = copy.deepcopy(i.get_optimizer_state_dict(model, optim))
            i.set_optimizer_state_dict(model, optim, state)
            return optim.state_dict()

        return call

    for pair in (("none", "some"), ("some", "none"), ("none", "none"), ("some", "rest")):
        assert_both_same(groups(*pair), m.plain)


def test_nested_optimizer_state_is_flattened_and_back():
    def call(i, model, optims, options):
        for state in optims[0].state.values():
            state["nested"] = {"a": {"b": torch.ones(2), "c": 3.0}, 7: torch.zeros(1)}
        flat = i.get_optimizer_state_dict(model, optims, options=options)
        kept = copy.deepcopy(flat)
        for state in optims[0].state.values():
            state["step"].zero_()
        i.set_optimizer_state_dict(model, optims, flat, options=options)
        return kept, optims[0].state_dict()

    want = assert_both_same(call, m.plain, m.adamw, {"flatten_optimizer_state_dict": True})
    assert any(".nested.a.b" in key for key in want[0])


@pytest.mark.parametrize("keep", (True, False))
def test_submodules_select_as_in_torch(keep):
    def call(i, model, optims, options):
        return i.get_model_state_dict(model, submodules={model[1]["a"]}, options=options)

    with pytest.warns(FutureWarning):
        assert_both_same(call, m.plain, None, {"keep_submodule_prefixes": keep})


def test_state_by_submodule_is_loaded_as_in_torch():
    def call(i, model, *_):
        part = model[1]["a"].state_dict()
        return i.set_model_state_dict(
            model, {model[1]["a"]: part, model[0]: model[0].state_dict()},
            options=Options(strict=False),
        ), model.state_dict()  # fmt: skip

    assert_both_same(call, m.plain)


def test_fqn_modifiers_are_torchs():
    def renaming():
        return nn.Sequential(m.Renaming(), nn.Linear(2, 2))

    assert_both_same(lambda i, model, *_: i.get_model_state_dict(model), renaming)
    assert_both_same(changed("dtype"), renaming)
    assert_both_same(lambda i, model, o, _: i.get_optimizer_state_dict(model, o), renaming, m.adamw)
    assert_both_same(changed("dtype"), m.plain, None, {"dsd_fqn_modifiers": "_others"})


@pytest.mark.parametrize("make", (m.plain, m.compiled), **by_name)
def test_patched_methods_are_ours_and_end_in_the_class(make):
    def call(i, model, optims, _):
        i._patch_model_state_dict(model)
        i._patch_optimizer_state_dict(model, optimizers=optims)
        model_state, optim_state = model.state_dict(), copy.deepcopy(optims[0].state_dict())
        model.load_state_dict(dict(model_state))
        optims[-1].load_state_dict(optim_state)
        return model_state, optim_state, i.get_state_dict(model, optims)

    assert_both_same(call, make, m.several)


def test_a_patch_of_the_other_implementation_is_known():
    for one, other in ((theirs, ours), (ours, theirs)):
        model = m.build(m.plain)
        one._patch_model_state_dict(model)
        m.same(other.get_model_state_dict(model), one.get_model_state_dict(model))


def test_methods_of_an_instance_are_called():
    model = m.build(m.plain)
    model[0].inner.state_dict = lambda *a, destination, prefix, keep_vars: destination.update(
        {prefix + "weight": 5}
    )
    state = ours.get_model_state_dict(model)
    assert state["0.inner.weight"] == 5 and "0.inner.bias" not in state
    called = []
    model[0].norm._load_from_state_dict = lambda *a: called.append(a[1])
    ours.set_model_state_dict(model, {k: v for k, v in state.items() if type(v) is not int},
                              options=Options(strict=False))  # fmt: skip
    assert called == ["0.norm."]


def test_a_patched_class_is_called(monkeypatch):
    model = m.build(m.plain)
    monkeypatch.setattr(nn.BatchNorm1d, "_save_to_state_dict", lambda *a: None)
    assert not [k for k in ours.get_model_state_dict(model) if ".norm." in k]


CHANGES = {
    "parameter replaced": lambda x: setattr(x[0], "scale", nn.Parameter(torch.zeros(4))),
    "parameter added": lambda x: x[0].register_parameter("new", nn.Parameter(torch.zeros(1))),
    "parameter gone": lambda x: x[0].register_parameter("scale", None),
    "parameter shared": lambda x: setattr(x[1]["b"], "bias", x[0].inner.bias),
    "parameter frozen": lambda x: x[0].scale.requires_grad_(False),
    "data swapped": lambda x: setattr(x[0].scale, "data", torch.zeros(4)),
    "tensors swapped": lambda x: torch.utils.swap_tensors(
        x[0].scale, nn.Parameter(torch.zeros(4))
    ),
    "memory exchanged": lambda x: x.to(torch.float64),
    "to empty": lambda x: [v.zero_() for v in x.to_empty(device="cpu").state_dict().values()],
    "module replaced": lambda x: x.__setitem__(0, m.build(m.Block, 3)),
    "module renamed": lambda x: x[1].update({"c": x[1].pop("b")}),
    "module added": lambda x: x.append(m.build(m.Block, 4)),
    "module wrapped": lambda x: x.__setitem__(0, m.checkpoint_wrapper(x[0])),
    "module compiled": lambda x: x.__setitem__(0, torch.compile(x[0], backend="eager")),
    "buffer now transient": lambda x: x[0]._non_persistent_buffers_set.add("kept"),
    "buffer replaced": lambda x: setattr(x[0], "kept", torch.zeros(3)),
    "hook registered": lambda x: x[0].register_state_dict_post_hook(
        lambda module, state, prefix, meta: state.move_to_end(prefix + "kept")
    ),
    "method patched": lambda x: setattr(x[0].inner, "_save_to_state_dict", lambda *a: None),
    "class exchanged": lambda x: setattr(x[1]["b"], "__class__", m.WithExtra),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_model_is_seen_by_the_next_call(change):
    model = m.build(m.plain)
    first = list(ours.get_model_state_dict(model))
    ours.set_model_state_dict(model, {}, options=Options(strict=False))
    change(model)
    want = theirs.get_model_state_dict(model)
    got = ours.get_model_state_dict(model)
    m.same(got, want)
    assert m.places(got) == m.places(want)
    made = [torch.optim.SGD(model.parameters(), lr=1, momentum=0.5)]
    m.train(made)
    m.same(ours.get_optimizer_state_dict(model, made), theirs.get_optimizer_state_dict(model, made))
    # Everything is loaded to where it is now.
    state = {k: torch.ones_like(v) if torch.is_tensor(v) else {"extra": 9} for k, v in want.items()}
    ours.set_model_state_dict(model, state, options=Options(strict=False))
    after = theirs.get_model_state_dict(model)
    assert all((v == 1).all() for v in after.values() if torch.is_tensor(v)), first


def test_nothing_of_a_model_is_kept_alive():
    model = m.build(m.plain)
    (optim,) = m.adamw(model)
    ours.get_state_dict(model, optim)
    old = weakref.ref(model[0].scale)
    model[0].scale = nn.Parameter(torch.ones(4))
    del optim
    gc.collect()
    assert old() is None
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_mappings_of_options_are_torchs():
    for make in m.MODELS:
        model = m.build(make)
        want = theirs._verify_options(model, (), False)
        got = ours._verify_options(model, (), False)
        assert got.fqn_param_mapping == want.fqn_param_mapping, make
        assert got.shared_params_mapping == want.shared_params_mapping, make


def parameters_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


def test_names_and_signatures_are_torchs():
    assert sorted(ours.__all__) == sorted(theirs.__all__)
    for name in ours.__all__:
        if not name.startswith(("get_", "set_")):
            assert getattr(ours, name) is getattr(theirs, name), name
    for name, value in vars(theirs).items():
        if inspect.isfunction(value) and value.__module__ == theirs.__name__:
            mine = getattr(ours, name)
            assert parameters_of(mine) == parameters_of(value), name


def test_state_that_was_only_saved_by_torch_is_loaded_and_the_other_way_round():
    for saver, loader in ((theirs, ours), (ours, theirs)):
        model, other = m.build(m.shared, 1), m.build(m.shared, 2)
        a, b = m.adamw(model), m.adamw(other)
        m.train(a)
        saved = copy.deepcopy(saver.get_state_dict(model, a))
        loader.set_state_dict(other, b, model_state_dict=saved[0], optim_state_dict=saved[1])
        m.same([o.state_dict() for o in b], [o.state_dict() for o in a])
        m.same(other.state_dict(), model.state_dict())
