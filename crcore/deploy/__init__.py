"""From trained integers to files that runtimes run: what the backends' exporters share.

A backend traces its network into one form of graph (`marker_model`), which is folded and completed (`prepared_graph`),
written for a runtime (`to_onnx`, `to_litert`), and run there for proof (`verify`).
"""

from crcore import CRCoreError

try:
    import onnx as onnx
    import onnxruntime as onnxruntime
except ModuleNotFoundError as error:
    raise CRCoreError(
        f"exporting needs the package {error.name!r}; install it with: pip install 'crcore[onnx]'"
    ) from error

from crcore._files import replaced as replaced
from crcore.deploy._export import verify_file as verify_file
from crcore.deploy._export import write_litert as write_litert
from crcore.deploy._export import write_onnx as write_onnx
from crcore.deploy._graph import DOMAIN as DOMAIN
from crcore.deploy._graph import FAKE_QUANTIZE as FAKE_QUANTIZE
from crcore.deploy._graph import INTEGER_WEIGHT as INTEGER_WEIGHT
from crcore.deploy._graph import OPSET as OPSET
from crcore.deploy._graph import codes_by_layer as codes_by_layer
from crcore.deploy._graph import expanded as expanded
from crcore.deploy._graph import float_twin as float_twin
from crcore.deploy._graph import marker_model as marker_model
from crcore.deploy._litert import metadata_of as metadata_of
from crcore.deploy._litert import to_litert as to_litert
from crcore.deploy._litert import with_metadata as with_metadata
from crcore.deploy._onnx import to_onnx as to_onnx
from crcore.deploy._prepare import prepared_graph as prepared_graph
from crcore.deploy._runtimes import Runtime as Runtime
from crcore.deploy._runtimes import open_runtime as open_runtime
from crcore.deploy._traced import Traced as Traced
from crcore.deploy._traced import check_request as check_request
from crcore.deploy._traced import existing_file as existing_file
from crcore.deploy._verify import Verification as Verification
from crcore.deploy._verify import latencies as latencies
from crcore.deploy._verify import verify as verify
