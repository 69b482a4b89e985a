"""What stands before a launch: the signatures read from the .cu files, and the launch gate that holds calls to them."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support import ROOT, raises
from support.kernels import FLOAT32, DryDevice, needs_compiler, parse, sentinel_array, valid_call

from segnet_scratch.errors import CompileError, DeviceError, DTypeError, LaunchError, SegnetError, ShapeError
from segnet_scratch.lab.proof.parts import PARTS
from segnet_scratch.lab.proof.parts.gate import MISUSES
from segnet_scratch.lab.proof.work import QUICK
from segnet_scratch.runtime.devices import HostDevice
from segnet_scratch.runtime.gate import MAX_GRID
from segnet_scratch.runtime.launch import ElementTypes, Launch, find_kernel, launch, shipped_kernels
from segnet_scratch.runtime.occupancy import MAX_SHARED
from segnet_scratch.runtime.signature import defined_kernels
from segnet_scratch.runtime.source import read_source


class TestSignature:
    def test_every_shipped_kernel_is_found(self):
        # Counted by another way than the parser's: each definition begins with these words.
        texts = [path.read_text() for path in (ROOT / "cuda").glob("*.cu")]
        assert sum(text.count('extern "C" __global__') for text in texts) == len(shipped_kernels()) > 20

    @pytest.mark.parametrize("name", sorted(shipped_kernels()))
    def test_every_shipped_kernel_parses(self, name):
        kernel = find_kernel(name)
        assert kernel.name == name
        lines = kernel.source.text.splitlines()
        assert name in lines[kernel.line - 1]
        for parameter in kernel.parameters:
            assert re.fullmatch(r"[A-Za-z_]\w*", parameter.name)
            raw = parameter.tensor_map or parameter.c_type == "bfloat16"
            assert parameter.dtype(FLOAT32).kind in ("V" if raw else "iuf")
            if not parameter.scalar:
                assert parameter.extent_code is not None, f"{name}: {parameter.name} has no shape comment"
                # The shape refers to integer parameters that exist.
                shape = parameter.extent_shape({p.name: 4 for p in kernel.parameters if p.scalar})
                assert all(isinstance(n, int) and n > 0 for n in shape)
        if name not in ("sgd_step", "sgd_pack_step", "keep_finite"):  # they write through a table of addresses
            assert any(p.pointer and not p.const for p in kernel.parameters), f"{name} has no output"

    def test_a_whole_signature(self):
        kernel = find_kernel("conv2d_forward_tiled")
        x, weight, bias, y, *sizes = kernel.parameters
        assert (x.name, x.c_type, x.pointer, x.const, x.optional, x.extent) == (
            *("x", "storage_t", True, True, False, "(n, h, w, c)"),
        )
        assert (weight.name, bias.name, y.name) == ("weight", "bias", "y")
        assert [p.optional for p in kernel.parameters] == [False, False, True] + [False] * 12
        assert [p.const for p in (weight, bias, y)] == [True, True, False]
        assert [p.name for p in sizes] == ["n", "h", "w", "c", "oh", "ow", "o", "kh", "kw", "pad_y", "pad_x"]
        assert all((p.c_type, p.pointer, p.extent) == ("int", False, None) for p in sizes)
        assert kernel.signature.startswith("conv2d_forward_tiled(storage_t* x, storage_t* weight, accumulate_t* bias")

    def test_arithmetic_in_shapes(self):
        codes = next(p for p in find_kernel("max_pool_forward").parameters if p.name == "codes")
        assert codes.extent == "(n, (h + 1) / 2, (w + 1) / 2, c)"
        assert codes.extent_shape({"n": 2, "h": 5, "w": 8, "c": 3}) == (2, 3, 4, 3)

    def test_element_types(self):
        kernel = find_kernel("batch_norm_forward")
        mixed = ElementTypes(np.dtype(np.float32), np.dtype(np.float64))
        assert [p.dtype(mixed).name for p in kernel.parameters[:3]] == ["float32", "float64", "float64"]
        assert mixed.defines == ("-DSTORAGE=float", "-DACCUMULATE=double")
        with pytest.raises(DTypeError, match=r"float16.*expected float32, float64 or bfloat16"):
            _ = ElementTypes.of(np.dtype(np.float16)).defines

    def test_element_types_by_name(self):
        names = ("float32", "float64", "bfloat16", "tf32", "tf32x3", "bf16")
        assert [ElementTypes.named(name).name for name in names] == list(names)
        assert ElementTypes.named("bfloat16").defines == ("-DSTORAGE=bfloat16", "-DACCUMULATE=float")
        assert ElementTypes.named("bf16").defines == ("-DSTORAGE=bfloat16", "-DACCUMULATE=float", "-DMULTIPLY=BF16")
        assert ElementTypes.named("tf32x3").defines == ("-DSTORAGE=float", "-DACCUMULATE=float", "-DMULTIPLY=TF32X3")
        assert len({ElementTypes.named(name) for name in names}) == len(names)

    def test_what_a_source_is_for(self, tmp_path):
        kernel = 'extern "C" __global__ void f(float* x) {}\n'
        (undeclared,) = parse(tmp_path, kernel)
        assert undeclared.source.elements == ("float32", "float64")
        assert undeclared.source.compiles_for("sm_75")
        (declared,) = parse(tmp_path, "// Element types: tf32, bf16; sm_80 and newer.\n" + kernel, "declared.cu")
        assert declared.source.elements == ("tf32", "bf16")
        wanted = {"sm_75": False, "sm_80": True, "sm_90a": True, "sm_120": True}
        assert {a: declared.source.compiles_for(a) for a in wanted} == wanted
        (typed,) = parse(tmp_path, "// Element types: bfloat16.\n" + kernel, "typed.cu")
        assert typed.source.elements == ("bfloat16",)
        with pytest.raises(DTypeError, match=r"f: cannot be launched for float32; declared.cu is for tf32, bf16"):
            launch(DryDevice(), declared, 1, 1, (np.ones(4, np.float32),), FLOAT32)

    def test_types_are_those_of_cuda(self, tmp_path):
        names = {
            "b1": ["bool"],
            "i1": ["char", "signed char", "int8_t"],
            "u1": ["uint8", "unsigned char", "uint8_t"],
            "i2": ["short", "int16_t"],
            "u2": ["unsigned short", "uint16_t"],
            "i4": ["int", "int32_t"],
            "u4": ["unsigned", "unsigned int", "uint32_t"],
            "i8": ["int64", "long long", "int64_t"],
            "u8": ["uint64", "unsigned long long", "size_t", "uint64_t"],
            "f4": ["float", "storage_t"],
            "f8": ["double", "accumulate_t"],
        }
        expected = {c_type: code for code, c_types in names.items() for c_type in c_types}
        rows = ", ".join(f"{c_type} x{i}, {c_type}* p{i}" for i, c_type in enumerate(expected))
        (kernel,) = parse(tmp_path, f'extern "C" __global__ void f({rows}) {{}}')
        types = ElementTypes(np.dtype(np.float32), np.dtype(np.float64))
        codes = [p.dtype(types).kind + str(p.dtype(types).itemsize) for p in kernel.parameters]
        assert codes[::2] == codes[1::2] == list(expected.values())

    def test_comments_and_qualifiers_in_odd_places(self, tmp_path):
        text = """
            /* extern "C" __global__ void commented_out(float* x) {} */
            // extern "C" __global__ void commented_out_too(float* x) {}
            extern "C"
            __global__ /* a remark */ void
            __launch_bounds__(max(128, 2 * 64)) // (n, n)
            odd( // (not, a, shape
                // (nor, this)
                const float *x, // (n, m + 1) of the input, not (n)
                float const* __restrict__ const OPTIONAL y, /* , */ int64 /* or, so */ n, int m, // (scalars, none)
                /* over
                   two lines, really */ unsigned char* codes /* a // (m) b */, // (n * (m - 1) / 2)
                unsigned long long* restless,
                double* const grid, float* last) /* { */ {
                // }
            }
        """
        (kernel,) = parse(tmp_path, text)
        assert kernel.name == "odd"
        assert not kernel.cooperative
        rows = [(p.name, p.c_type, p.pointer, p.const, p.optional, p.extent) for p in kernel.parameters]
        assert rows == [
            ("x", "float", True, True, False, "(n, m + 1)"),
            ("y", "float", True, True, True, None),
            ("n", "int64", False, False, False, None),
            ("m", "int", False, False, False, None),
            ("codes", "unsigned char", True, False, False, "(n * (m - 1) / 2)"),
            ("restless", "unsigned long long", True, False, False, None),
            ("grid", "double", True, False, False, None),
            ("last", "float", True, False, False, None),
        ]
        assert kernel.parameters[4].extent_shape({"n": 5, "m": 4}) == (7,)

    @pytest.mark.parametrize(
        "head", ["void __launch_bounds__(256) f", "__launch_bounds__(256, 2) void f", "void\nf", "void f"]
    )
    def test_launch_bounds_may_stand_on_either_side(self, tmp_path, head):
        (kernel,) = parse(tmp_path, f'extern "C" __global__ {head}(float* x) {{}}')
        assert (kernel.name, kernel.line, len(kernel.parameters)) == ("f", 1, 1)

    LINKED = (
        ("block", 'extern "C" {\n__global__ void f(float* x, int n) {}\n}'),
        ("block with others", 'extern "C"{ struct S { int a; };\n__device__ int h() { return 1; } void f2(); KERNEL }'),
        ("block of C headers", '#ifdef __cplusplus\nextern "C" {\n#endif\nKERNEL\n#ifdef __cplusplus\n}\n#endif'),
        ("declared first", 'extern "C" __global__ void f(float*, int);\nKERNEL'),
        ("declared in a block", 'extern "C" { __global__ void f(float*, int); }\nKERNEL'),
        ("void first", 'extern "C" void __global__ __launch_bounds__(64) f(float* x, int n) {}'),
        (
            "attributes",
            'extern "C" __global__ __cluster_dims__(2, 1, 1) __launch_bounds__(64) void f(float* x, int n) {;}',
        ),
        ("braces in strings", """extern "C" { const char* s = "}\\"}"; char c = '}', d = '\\''; KERNEL }"""),
        ("a comment in a string", 'extern "C" { const char* s = "//"; KERNEL }'),
        ("braces in comments", 'extern "C" { // }\n/* } */ KERNEL }'),
    )

    @pytest.mark.parametrize("text", [text for _, text in LINKED], ids=[name for name, _ in LINKED])
    def test_c_linkage(self, tmp_path, text):
        (kernel,) = parse(
            tmp_path, text.replace("KERNEL", "__global__ void f(float* x, int n) { if (n) { x[0] = 1; } }")
        )
        assert (kernel.name, [p.name for p in kernel.parameters]) == ("f", ["x", "n"])

    @pytest.mark.parametrize(
        "text", ["KERNEL", 'extern "C" { int a; }\nKERNEL', 'namespace n { KERNEL }\nextern "C" {}']
    )
    def test_kernels_without_c_linkage_are_not_found_by_name(self, tmp_path, text):
        assert parse(tmp_path, text.replace("KERNEL", "__global__ void f(float* x) {}")) == ()
        assert [kernel.name for kernel in defined_kernels(read_source(tmp_path / "written.cu"))] == ["f"]

    LIST = """#define LIST                        \\
    const float* __restrict__ x, /* (n, m + 1) of the input */ \\
    /* (not, this) */ int n,     \\
    TYPE* y, /* (n) */           \\
    int m
extern "C" __global__ void f(LIST) {}
extern "C" __global__ void g(LIST) {}
"""

    def test_a_list_of_parameters_that_several_kernels_share(self, tmp_path):
        f, g = parse(tmp_path, self.LIST.replace("TYPE", "float"))
        assert f.parameters == g.parameters
        assert [(p.name, p.extent) for p in f.parameters] == [
            ("x", "(n, m + 1)"),
            ("n", None),
            ("y", "(n)"),
            ("m", None),
        ]
        f, _ = parse(tmp_path, self.LIST.replace("TYPE", "half"))
        with pytest.raises(CompileError, match=r"written\.cu:4: .*'half'"):
            _ = f.parameters
        (f,) = parse(tmp_path, 'extern "C" __global__ void f(LIST) {}')
        with pytest.raises(CompileError, match="cannot understand the kernel parameter 'LIST'"):
            _ = f.parameters

    def test_no_parameters(self, tmp_path):
        (kernel,) = parse(tmp_path, 'extern "C" __global__ void f() {}')
        assert kernel.parameters == ()

    ERRORS = (
        ("unknown type", ["half* x, // (n)", "int n"], 3, r"'half\* x' has type 'half'"),
        ("unknown type later", ["float* x, // (n)", "long n"], 4, "has type 'long'"),
        ("pointer to pointer", ["int n,", "float** x"], 4, r"cannot understand the kernel parameter 'float\*\* x'"),
        ("reference", ["float& x"], 3, "cannot understand the kernel parameter"),
        ("array", ["float x[4]"], 3, "cannot understand the kernel parameter"),
        ("template", ["array<float> x"], 3, "cannot understand the kernel parameter"),
        ("only qualifiers", ["int n,", "const *"], 4, "cannot understand the kernel parameter"),
        ("only a type", ["int n,", "const float*"], 4, "kernel parameter 'const float[*]'"),
        ("call in a shape", ["float* x, // (__import__('os').system('true'))", "int n"], 3, "may use names, integers"),
        ("another call in a shape", ["float* x, // (n, exit(n))", "int n"], 3, "may use names, integers"),
        ("attribute in a shape", ["int n,", "float* x // (n.real)"], 4, "may use names, integers"),
        ("lambda in a shape", ["float* x // (lambda: 1)"], 3, "may use names, integers"),
        ("comprehension in a shape", ["float* x // ([n for n in m])"], 3, "may use names, integers"),
        ("power in a shape", ["float* x // (9 ** 9 ** 9)"], 3, "may use names, integers"),
        ("string in a shape", ["float* x, // ('a' * n)", "int n"], 3, "may use names, integers"),
        ("float in a shape", ["float* x, // (1.5 * n)", "int n"], 3, "may use names, integers"),
        ("truth in a shape", ["float* x, // (True, n)", "int n"], 3, "may use names, integers"),
        ("tuple in a shape", ["float* x, // ((1, 2) * 999999999999)", "int n"], 3, "may use names, integers"),
        ("nested tuple in a shape", ["float* x, // ((n, n), n)", "int n"], 3, "may use names, integers"),
        ("no expression", ["float* x // (see the paper)"], 3, "is not an expression"),
        ("null byte", ["float* x // (n\0)"], 3, "is not an expression"),
    )

    @pytest.mark.parametrize(("rows", "line", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
    def test_errors_name_file_and_line(self, tmp_path, rows, line, message):
        text = "\n".join(["// A kernel.", 'extern "C" __global__ void f(', *rows, ") {", "}"])
        right = '\nextern "C" __global__ void g(int n) {}'
        (kernel, other) = parse(tmp_path, text + right)
        assert not kernel.launchable
        with raises(CompileError, f"written.cu:{line}: ", match=message):
            _ = kernel.parameters
        assert other.launchable  # one kernel that cannot be launched is no obstacle to the next
        assert [p.name for p in other.parameters] == ["n"]

    def test_lines_count_from_where_the_parameters_begin(self, tmp_path):
        with pytest.raises(CompileError, match=r"written\.cu:4: .*'half'"):
            _ = parse(tmp_path, 'extern "C"\n__global__ void\nf(int n,\nhalf* x) {}')[0].parameters

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ('\nextern "C" __global__ void f(int n', 2),
            ('extern "C" __global__ void f(int n)', 1),
            ('\n\nextern "C" __global__ void f(int n) { if (n) {', 3),
            # The body of the next kernel is not this one's.
            ('extern "C" __global__ void f(int n)\nextern "C" __global__ void g(int n) {}', 1),
        ],
    )
    def test_missing_body(self, tmp_path, text, line):
        with pytest.raises(CompileError, match=rf"written\.cu:{line}: the kernel f has no complete parameter list"):
            parse(tmp_path, text)

    def test_duplicate_kernel(self, tmp_path):
        one = 'extern "C" __global__ void f(int n) {}\n'
        with pytest.raises(CompileError, match=r"written\.cu:4: the kernel f is defined twice.* line 1"):
            parse(tmp_path, one + "\n\n" + one)

    def test_a_shape_with_a_name_that_is_no_integer_parameter(self, tmp_path):
        for shape, others in (("(m)", "int n"), ("(scale)", "float scale")):
            (kernel,) = parse(tmp_path, f'extern "C" __global__ void f(float* x, // {shape}\n{others}) {{}}')
            with pytest.raises(
                SegnetError, match=r"written\.cu: f: the shape comment .* of x uses a name that is no integer"
            ):
                launch(DryDevice(), kernel, 1, 1, (np.ones(4, np.float32), 4), FLOAT32)

    def test_a_shape_that_divides_by_zero(self, tmp_path):
        (kernel,) = parse(tmp_path, 'extern "C" __global__ void f(float* x, // (n / s)\nint n, int s) {}')
        with pytest.raises(ShapeError, match=r"f: argument x .*\(n / s\).* s=0"):
            launch(DryDevice(), kernel, 1, 1, (np.ones(4, np.float32), 4, 0), FLOAT32)
        launch(DryDevice(), kernel, 1, 1, (np.ones(2, np.float32), 4, 2), FLOAT32)

    def test_sources_that_cannot_be_read(self, tmp_path):
        with pytest.raises(CompileError, match=r"cannot read the kernel source .*absent\.cu"):
            read_source(tmp_path / "absent.cu")
        with pytest.raises(CompileError, match="cannot read the kernel source"):
            read_source(tmp_path)
        (tmp_path / "latin.cuh").write_bytes(b"// \xe4\n")
        (tmp_path / "latin.cu").write_bytes(b"// \xe4\n")
        (tmp_path / "good.cu").write_text('#include "latin.cuh"\n')
        with pytest.raises(CompileError, match=r"latin\.cu is not UTF-8"):
            read_source(tmp_path / "latin.cu")
        with pytest.raises(CompileError, match=r"latin\.cuh is not UTF-8"):
            read_source(tmp_path / "good.cu")

    def test_unknown_kernel(self):
        with pytest.raises(LaunchError, match=r"there is no kernel 'relu'; the kernels are .*relu_forward"):
            find_kernel("relu")


def with_headers(path, seen=()):
    """The texts of a source and of the headers that a GPU's compiler sees, each once."""
    texts = [path.read_text()]
    for name in re.findall(r'#include "([^"]+)"', texts[0]):
        header = next(folder / name for folder in (path.parent, ROOT / "cuda") if (folder / name).is_file())
        if header not in seen and header.suffix == ".cuh":
            seen = (*seen, header)
            texts += with_headers(header, seen)
    return texts


def names_that_meet(texts):
    """(names, bodies): an oracle by another route than the parser's: the names that lead to a barrier or to shared
    memory, through any number of functions and headers, whatever these are called; and all bodies by name."""
    bodies: dict[str, str] = {}
    for text in texts:
        text = re.sub(r"//[^\n]*", "", text)
        for match in re.finditer(r"(\w+)\([^(){};]*(?:\([^()]*\)[^(){};]*)*\)\s*(?:const\s*)?\{", text):
            depth = 1
            for end in range(match.end(), len(text)):
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                if depth == 0:
                    break
            bodies[match.group(1)] = bodies.get(match.group(1), "") + text[match.end() : end]
    meets = {"__syncthreads", "SHARED_ARRAY", "SHARED_DYNAMIC", "__shared__"}
    while True:
        more = {name for name, body in bodies.items() if meets & set(re.findall(r"\w+", body))} - meets
        more -= {"for", "if", "while", "switch"}
        if not more:
            return meets, bodies
        meets |= more


class TestCooperative:
    """Kernels whose threads meet at barriers or share memory need fibers; a wrong guess either crashes or is slow."""

    @pytest.mark.parametrize(
        ("before", "body", "expected"),
        [
            ("", "x[0] = 1;", False),
            ("", "__syncthreads();", True),
            ("", "if (__syncthreads_or (n)) x[0] = 1;", True),
            ("", "__syncwarp();", True),
            ("", "SHARED_ARRAY(float, tile, [4]);", True),
            ("", "SHARED_DYNAMIC(float, tile);", True),
            ("", "__shared__ float tile[4];", True),
            ("", "x[0] = block_sum<32>(x[0]);", True),
            ("", "// __syncthreads();", False),
            ("/* __syncthreads() */", "x[0] = 1; /* __shared__ */", False),
            ("__device__ void meet() { __syncthreads(); }", "meet();", True),
            ("__device__ float* tile() { SHARED_ARRAY(float, t, [4]); return t; }", "tile();", True),
            ("#define MEET __syncthreads()", "MEET;", True),
            ("#define MEET() \\\n    __syncthreads()", "MEET();", True),
        ],
    )
    def test_where_a_barrier_can_stand(self, tmp_path, before, body, expected):
        (kernel,) = parse(tmp_path, f'{before}\nextern "C" __global__ void f(float* x, int n) {{\n{body}\n}}')
        assert kernel.cooperative is expected

    def test_shipped_kernels(self):
        found = {}
        for path in (ROOT / "cuda").glob("*.cu"):
            kernels = [name for name, kernel in shipped_kernels().items() if kernel.source.path == path]
            meets, bodies = names_that_meet(with_headers(path))
            assert set(kernels) <= set(bodies)
            found |= {name: name in meets for name in kernels}
        assert found["conv2d_forward_tiled"]
        assert found["cross_entropy_partial"]
        assert found["batch_norm_partial_statistics"]
        assert not found["relu_forward"]
        assert {name: kernel.cooperative for name, kernel in shipped_kernels().items()} == found

    def test_a_neighbour_does_not_matter(self, tmp_path):
        text = 'extern "C" __global__ void {}(int n) {{ {} }}\n'
        flat, fibers = parse(tmp_path, text.format("flat", "") + text.format("fibers", "__syncthreads();"))
        assert (flat.cooperative, fibers.cooperative) == (False, True)


class TestGate:
    @pytest.mark.parametrize("work", [*PARTS["gate"].works("any", QUICK, 0)], ids=lambda work: work.target)
    def test_misuse_is_refused_and_nothing_is_launched(self, work):
        assert PARTS["gate"].do(work).failures == []

    @pytest.mark.parametrize(
        ("name", "element"), [(name, e) for name, k in sorted(shipped_kernels().items()) for e in k.source.elements]
    )
    def test_a_right_launch_passes_with_exact_types(self, name, element):
        # Without this, a gate that refuses everything, or a recorder that records nothing, would pass the tests above.
        types = ElementTypes.named(element)
        call, device = valid_call(find_kernel(name), types), DryDevice()
        call.launch(device)
        (launched,) = device.launches
        values, kernel = launched.arguments, call.kernel
        assert replace(launched, arguments=()) == Launch(kernel, types, (1, 1, 1), (1, 1, 1), 0)
        for parameter, given, value in zip(kernel.parameters, call.arguments, values, strict=True):
            if not parameter.scalar:
                assert value is given
            else:
                assert isinstance(value, np.generic)
                assert value.dtype == parameter.dtype(types)
                assert value == given
        optional = [p.name for p in kernel.parameters if p.optional]
        for parameter in optional:
            call.put(parameter, None).launch(device)
        assert len(device.launches) == 1 + len(optional)

    @needs_compiler
    def test_on_the_real_device_outputs_keep_their_contents(self):
        device, kernel = HostDevice(), find_kernel("add_forward")
        for attempts in MISUSES.values():
            for wrong, _, _ in attempts(valid_call(kernel)):
                before = [a.tobytes() for a in wrong.arguments if isinstance(a, np.ndarray)]
                with pytest.raises(SegnetError):
                    wrong.launch(device)
                assert [a.tobytes() for a in wrong.arguments if isinstance(a, np.ndarray)] == before
        a, b, y = np.arange(6, dtype=np.float32), np.ones(6, np.float32), sentinel_array(6, np.float32)
        launch(device, kernel, 1, 8, (a, b, y, 6), FLOAT32)
        np.testing.assert_array_equal(y, a + 1)

    def test_legal_extremes(self):
        call, device = valid_call(find_kernel("sgd_step")), DryDevice()
        replace(call, grid=MAX_GRID, block=(1, 16, 64), shared=MAX_SHARED).launch(device)
        replace(call, grid=[2, 3], block=[1024]).launch(device)
        assert [(launched.grid, launched.block) for launched in device.launches] == [
            (MAX_GRID, (1, 16, 64)),
            ((2, 3, 1), (1024, 1, 1)),
        ]
        for value in (float("inf"), float("nan"), np.float32(0.5), np.int64(1), 1e308, -1):
            call.put("momentum", value).launch(device)
        for value in (np.int8(6), np.uint64(2**63 - 1), -(2**63)):
            call.put("chunk_size", value).launch(device)  # it is in no shape comment
        assert len(device.launches) == 11

    @pytest.mark.parametrize(("architecture", "kib"), [("sm_75", 64), ("sm_80", 163), ("sm_89", 99), ("sm_90", 227)])
    def test_each_gpu_has_its_own_limit_of_shared_memory(self, architecture, kib):
        call, device = valid_call(find_kernel("sgd_step")), DryDevice()
        device.architecture = architecture
        replace(call, shared=kib * 1024).launch(device)
        with pytest.raises(LaunchError, match=f"dynamic shared memory; expected an integer, 0 to {kib * 1024}"):
            replace(call, shared=kib * 1024 + 1).launch(device)
        assert len(device.launches) == 1

    def test_shapes_are_compared_by_their_number_of_elements(self):
        call, device = valid_call(find_kernel("batch_norm_forward")), DryDevice()
        x = next(a for p, a in call.of("arrays") if p.name == "x")  # (rows, c)
        call.put("x", x.reshape(2, 3, 4)).launch(device)
        assert len(device.launches) == 1

    def test_an_array_without_a_shape_may_have_any_size_but_none(self, tmp_path):
        (kernel,) = parse(tmp_path, 'extern "C" __global__ void f(float* x) {}')
        device = DryDevice()
        launch(device, kernel, 1, 1, (np.zeros((7, 1, 3), np.float32),), FLOAT32)
        with pytest.raises(ShapeError, match="f: argument x is empty"):
            launch(device, kernel, 1, 1, (np.zeros((7, 0, 3), np.float32),), FLOAT32)
        assert len(device.launches) == 1

    def test_two_inputs_may_be_the_same_array_and_neighbours_may_touch(self):
        call, device = valid_call(find_kernel("add_forward")), DryDevice()
        memory = sentinel_array(12, np.float32)
        call.put("a", memory[:6]).put("b", memory[:6]).put("y", memory[6:]).launch(device)
        assert len(device.launches) == 1

    def test_array_of_another_device(self):
        class Elsewhere(DryDevice):
            name = "cuda"

            def owns(self, array: Any) -> bool:
                return False

        with pytest.raises(
            DeviceError, match=r"relu_forward: argument x is a numpy\.ndarray; expected .* the cuda device"
        ):
            valid_call(find_kernel("relu_forward")).launch(Elsewhere())

    @needs_compiler
    def test_element_types_that_no_kernel_has(self):
        kernel = find_kernel("relu_forward")
        half = ElementTypes.of(np.dtype(np.float16))
        with pytest.raises(DTypeError, match="float16"):
            valid_call(kernel, half).launch(HostDevice())
