"""Linen models with other layers at some paths.

A linen model creates its layers again in every call, so there is nothing to replace in it.  An edited model is one of a
subclass of the model's class, with the same fields, attributes and methods.  While one of its methods runs, the calls
of the layers are intercepted.  The edits belong to the class and not to the object, so that Flax can copy the object
field by field, as its transformations do.

An edited model may be a part of another edited model, and both may have an edit for one path.  Three rules decide which
new layer is called:

1. Every edit in progress sees every call: Flax hands a call to all interceptors, from the outermost to the innermost.
2. The innermost edit with an entry for the path answers, as its model was edited first; the others let the call pass.
3. The call of its new layer, which has the same path, is intercepted again.  The edit that made the layer, and those
   inside it, let it pass; so an outer edit can replace the new layer by its own.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen

from jaxbn._models import intercept
from jaxbn._models.model import BATCH_NORMS, LINEAR

Makers = Mapping[str, Callable]  # make(old, parent=scope) returns the layer to call instead of old; by path

# Flax hands the functions behind the methods to interceptors.  A subclass's super().__call__(x) is a call of them too.
_KINDS = {
    inspect.unwrap(kind.__call__): kind for kind in (*BATCH_NORMS, *LINEAR) if issubclass(kind, flax.linen.Module)
}


def edited(model: flax.linen.Module, makers: Makers) -> flax.linen.Module:
    """Returns a model that calls new layers at these paths; a second operation on one adds to its edits."""
    original, earlier = type(model), {}
    if isinstance(model, _Edited):
        original, earlier = model.jaxbn_original, model.jaxbn_makers
    both = dict(earlier)
    for path, make in makers.items():
        both[path] = functools.partial(_make_twice, both[path], make) if path in both else make
    return _transplanted(original, both, model.clone().__dict__)


def _make_twice(first: Callable, second: Callable, old: flax.linen.Module, **parent: Any) -> flax.linen.Module:
    """Makes the layer of a second operation from that of the first."""
    return second(first(old, **parent), **parent)


def _transplanted(original: type, makers: Makers, attributes: dict[str, Any]) -> flax.linen.Module:
    """Returns an object with these attributes, of a subclass of ``original`` with these edits; also to unpickle it."""
    model = object.__new__(_edited_class(original, makers))
    model.__dict__.update(attributes)
    return model


def _edited_class(original: type, makers: Makers) -> type:
    """Makes a subclass of a linen model's class whose methods run with new layers."""
    # Flax makes each class a dataclass, which would replace these methods.
    kept = {name: getattr(original, name) for name in ("__init__", "__eq__", "__hash__")}
    if "__call__" in dir(original):

        @functools.wraps(original.__call__)  # as it is wrapped by Flax already
        def __call__(self, *args, **kwargs):
            # Where nn.remat or another transformation has made the class, its call is no method of Flax's.
            with contextlib.nullcontext() if self.scope is None else _replacing_layers(makers, self.path):
                return original.__call__(self, *args, **kwargs)

        kept["__call__"] = __call__
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    edits = {"jaxbn_original": original, "jaxbn_makers": makers}
    return type(original.__name__, (_Edited, original), kept | names | edits)


class _Running(NamedTuple):
    """The edits of one model while it is being called.

    Attributes:
      prefix: the model's own path.
      edits: those of its class, by which they are known.
      makers: functions that make a new layer, by the path of the old layer.
      made: layers made so far in this call.
    """

    prefix: tuple[str, ...]
    edits: Makers
    makers: Makers
    made: list[flax.linen.Module]


class _InProgress(threading.local):
    """The edits of the models that are being called, each inside the one before.

    One list for each thread, as Flax has its interceptors: other threads may be calling models at the same time.
    """

    def __init__(self):
        self.edits: list[_Running] = []


_in_progress = _InProgress()


def _next_edit(layer: flax.linen.Module, path: str) -> _Running | None:
    """Returns the edit that is the next to replace a layer, or None."""
    next_edit = None
    for edit in _in_progress.edits:  # from the outermost model to the innermost, so that the innermost wins: rule 2
        if any(layer is made for made in edit.made):
            break  # this edit has made the layer, so it is done with it, and so are all inside it: rule 3
        if path in edit.makers:
            next_edit = edit
    return next_edit


def _will_be_replaced(layer: flax.linen.Module, path: str) -> bool:
    """Returns whether another layer will be called in place of this one."""
    return _next_edit(layer, path) is not None


# run() must skip calls that an edited model redirects.
intercept.ignore_layers(_will_be_replaced)


@contextlib.contextmanager
def _replacing_layers(makers: Makers, prefix: tuple[str, ...]) -> Generator[None]:
    """Replaces the layers, called in this context, of an edited model whose own path is ``prefix``."""
    # A method of the model may call another one, also of a copy that a transformation has made of the model.
    if any(running.edits is makers and running.prefix == prefix for running in _in_progress.edits):
        yield
        return
    running = _Running(prefix, makers, {"/".join(filter(None, (*prefix, path))): makers[path] for path in makers}, [])

    def call_new_layer(proceed: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        old, kind = context.module, _KINDS.get(context.orig_method.func)
        if kind is None or old.scope is None:
            return proceed(*args, **kwargs)
        path = "/".join(old.path)
        if _next_edit(old, path) is not running:  # rules 1 and 2
            return proceed(*args, **kwargs)
        new = running.makers[path](old, parent=old.scope)
        running.made.append(new)
        # The old layer's call, which this one is a part of, is captured too, at the same path.
        object.__setattr__(new, "sow", functools.partial(_sow_but_outputs, new))
        # Rule 3.  In a copy of the old layer, the parent's call, since a subclass's own is what has led here.
        return kind.__call__(new, *args, **kwargs) if type(new) is type(old) else new(*args, **kwargs)

    _in_progress.edits.append(running)
    try:
        with flax.linen.intercept_methods(call_new_layer):
            yield
    finally:
        _in_progress.edits.pop()


def _sow_but_outputs(layer: flax.linen.Module, collection: str, *args: Any, **kwargs: Any) -> bool:
    """Sows as the layer does, except for its outputs under ``capture_intermediates``."""
    return collection != "intermediates" and type(layer).sow(layer, collection, *args, **kwargs)


# For a reader, a part of a linen module; Flax would make a dataclass of it if it were one.
_Part: type[flax.linen.Module] = flax.linen.Module if TYPE_CHECKING else object


class _Edited(_Part):
    """What the classes of edited models have before the methods of the model's class.

    Attributes:
      jaxbn_original: the model's class as it was.
      jaxbn_makers: functions that make the new layers, by path in the model.
    """

    jaxbn_original: type
    jaxbn_makers: Makers

    def _call_wrapped_method(self, fun: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a method; Flax calls all methods of a module through this one."""
        if self.scope is None:
            return super()._call_wrapped_method(fun, args, kwargs)
        with _replacing_layers(self.jaxbn_makers, self.path):
            return super()._call_wrapped_method(fun, args, kwargs)

    # These two run functions of the model that need not be its methods, as in apply(..., method=lambda module, x: ...).

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the model, as :meth:`flax.linen.Module.apply`."""
        with _replacing_layers(self.jaxbn_makers, ()):
            return super().apply(*args, **kwargs)

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Calls and initializes the model, as :meth:`flax.linen.Module.init_with_output`."""
        with _replacing_layers(self.jaxbn_makers, ()):
            return super().init_with_output(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any, /) -> str | tuple[Any, ...]:
        """Pickles the class as the model's own and the edits."""
        if "jaxbn_makers" not in vars(type(self)):  # a transformation's subclass, which is pickled as Flax does
            return super().__reduce_ex__(protocol)
        return _transplanted, (self.jaxbn_original, self.jaxbn_makers, self.__dict__)
