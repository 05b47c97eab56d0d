// The verdict parser for Python: texts are read where they lie, verdicts become Python objects.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <string>
#include <utility>
#include <vector>

#include "verdict.h"

namespace nb = nanobind;

namespace {

using rmr1::FormatError;
using rmr1::Verdict;

// The named tuples Span(start, end) and RubricItem(span, weight). Made when the module is loaded
// and never freed, as nanobind's own types are.
PyObject* span_type = nullptr;
PyObject* item_type = nullptr;

nb::object to_python(const rmr1::Span& span) { return nb::handle(span_type)(span.start, span.end); }

nb::object to_python(const rmr1::RubricItem& item) {
    return nb::handle(item_type)(to_python(item.span), nb::cast(item.weight));
}

nb::object to_python(const std::optional<rmr1::Span>& span) {
    return span ? to_python(*span) : nb::none();
}

template <class Item>
nb::object to_python(const std::vector<Item>& items) {
    nb::list list;
    for (const Item& item : items) list.append(to_python(item));
    return nb::tuple(list);
}

nb::object to_python(rmr1::Answer answer) {
    switch (answer) {
        case rmr1::Answer::a: return nb::str("A");
        case rmr1::Answer::b: return nb::str("B");
        case rmr1::Answer::tie: return nb::str("tie");
        default: return nb::none();
    }
}

nb::object to_python(rmr1::TaskType type) {
    switch (type) {
        case rmr1::TaskType::chat: return nb::str("chat");
        case rmr1::TaskType::reasoning: return nb::str("reasoning");
        default: return nb::none();
    }
}

nb::object to_python(FormatError error) { return nb::cast(error); }

// The fields of a verdict in the order of its constructor: the one list that properties, repr,
// hash and pickling go by.
struct Field {
    const char* name;
    nb::object (*get)(const Verdict&);
};

template <auto member>
nb::object get(const Verdict& verdict) {
    return to_python(verdict.*member);
}

constexpr Field fields[] = {
    {"answer", get<&Verdict::answer>},
    {"task_type", get<&Verdict::task_type>},
    {"solution", get<&Verdict::solution>},
    {"rubric", get<&Verdict::rubric>},
    {"justify", get<&Verdict::justify>},
    {"evaluation", get<&Verdict::evaluation>},
    {"answer_span", get<&Verdict::answer_span>},
    {"quotes_a", get<&Verdict::quotes_a>},
    {"quotes_b", get<&Verdict::quotes_b>},
    {"summaries_a", get<&Verdict::summaries_a>},
    {"summaries_b", get<&Verdict::summaries_b>},
    {"rubric_items", get<&Verdict::rubric_items>},
    {"error", get<&Verdict::error>},
};

nb::tuple values(const Verdict& verdict) {
    nb::list list;
    for (const Field& field : fields) list.append(field.get(verdict));
    return nb::tuple(list);
}

// Fields that are None or empty are left out.
std::string repr(const Verdict& verdict) {
    std::string text = "Verdict(";
    for (const Field& field : fields) {
        const nb::object value = field.get(verdict);
        const bool is_error = field.get == &get<&Verdict::error>;
        if (!is_error && !nb::cast<bool>(nb::bool_(value))) continue;
        const nb::object shown = is_error ? nb::str(value.attr("name")) : nb::repr(value);
        text += std::string(field.name) + "=" + (is_error ? "FormatError." : "") +
                nb::cast<std::string>(shown) + (is_error ? ")" : ", ");
    }
    return text;
}

using Pair = std::pair<std::int64_t, std::int64_t>;

std::optional<rmr1::Span> from_python(const std::optional<Pair>& span) {
    return span ? std::optional(rmr1::Span{span->first, span->second}) : std::nullopt;
}

std::vector<rmr1::Span> from_python(const std::vector<Pair>& spans) {
    std::vector<rmr1::Span> result;
    for (const auto& [start, end] : spans) result.push_back({start, end});
    return result;
}

rmr1::Answer answer_from(const std::optional<std::string>& answer) {
    if (!answer) return rmr1::Answer::none;
    if (*answer == "A") return rmr1::Answer::a;
    if (*answer == "B") return rmr1::Answer::b;
    if (*answer == "tie") return rmr1::Answer::tie;
    throw nb::value_error(("answer must be A, B, tie or None, not " + *answer).c_str());
}

rmr1::TaskType task_type_from(const std::optional<std::string>& type) {
    if (!type) return rmr1::TaskType::none;
    if (*type == "chat") return rmr1::TaskType::chat;
    if (*type == "reasoning") return rmr1::TaskType::reasoning;
    throw nb::value_error(("task_type must be chat, reasoning or None, not " + *type).c_str());
}

rmr1::ParseOptions options_from(const std::string& rule, bool allow_tie) {
    if (rule == "last_tag") return {rmr1::Rule::last_tag, allow_tie};
    if (rule == "rm_r1") return {rmr1::Rule::rm_r1, allow_tie};
    throw nb::value_error(("rule must be last_tag or rm_r1, not " + rule).c_str());
}

// The characters of a str in place. They live as long as the str does.
rmr1::AnyText text_of(nb::handle text, const std::string& what) {
    PyObject* object = text.ptr();
    if (!PyUnicode_Check(object)) {
        const std::string type = nb::cast<std::string>(nb::type_name(text.type()));
        throw nb::type_error((what + " must be a str, not " + type).c_str());
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(object) != 0) throw nb::python_error();
#endif
    const auto size = static_cast<std::size_t>(PyUnicode_GET_LENGTH(object));
    switch (PyUnicode_KIND(object)) {
        case PyUnicode_1BYTE_KIND: return rmr1::Text<std::uint8_t>(PyUnicode_1BYTE_DATA(object), size);
        case PyUnicode_2BYTE_KIND: return rmr1::Text<std::uint16_t>(PyUnicode_2BYTE_DATA(object), size);
        default: return rmr1::Text<std::uint32_t>(PyUnicode_4BYTE_DATA(object), size);
    }
}

Verdict parse_verdict(nb::handle text, const std::string& rule, bool allow_tie) {
    return rmr1::parse_verdict(text_of(text, "text"), options_from(rule, allow_tie));
}

// The tuple keeps its texts alive and unchanged while no lock is held.
nb::list parse_verdicts(const nb::tuple& texts, long long threads, const std::string& rule,
                        bool allow_tie) {
    const auto options = options_from(rule, allow_tie);
    if (threads < 0 || threads > 1024) {
        const std::string got = std::to_string(threads);
        throw nb::value_error(("threads must be from 0 (all cores) to 1024, not " + got).c_str());
    }
    std::vector<rmr1::AnyText> views;
    views.reserve(texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i) {
        views.push_back(text_of(texts[i], "texts[" + std::to_string(i) + "]"));
    }
    std::vector<Verdict> verdicts;
    {
        nb::gil_scoped_release unlocked;
        verdicts = rmr1::parse_verdicts(views, options, static_cast<unsigned>(threads));
    }
    nb::list result;
    for (Verdict& verdict : verdicts) result.append(nb::cast(std::move(verdict)));
    return result;
}

void bind_format_error(nb::module_& m) {
    nb::enum_<FormatError>(m, "FormatError", nb::is_arithmetic(),
                           "The first rule of the format that a judgment breaks; OK is none.")
        .value("OK", FormatError::ok)
        .value("UNCLOSED_THINK", FormatError::unclosed_think)
        .value("UNCLOSED_TAG", FormatError::unclosed_tag)
        .value("UNOPENED_TAG", FormatError::unopened_tag)
        .value("NO_TYPE", FormatError::no_type)
        .value("UNKNOWN_TYPE", FormatError::unknown_type)
        .value("NO_SOLUTION", FormatError::no_solution)
        .value("NO_RUBRIC", FormatError::no_rubric)
        .value("NO_RUBRIC_ITEMS", FormatError::no_rubric_items)
        .value("NO_WEIGHT", FormatError::no_weight)
        .value("NO_JUSTIFY", FormatError::no_justify)
        .value("NO_EVAL", FormatError::no_eval)
        .value("NO_ANSWER", FormatError::no_answer)
        .value("BAD_ANSWER", FormatError::bad_answer)
        .value("EMPTY_SECTION", FormatError::empty_section)
        .value("REPEATED_SECTION", FormatError::repeated_section)
        .value("REPEATED_ANSWER", FormatError::repeated_answer)
        .value("OUT_OF_ORDER", FormatError::out_of_order)
        .value("MISPLACED_SECTION", FormatError::misplaced_section)
        .value("TEXT_AFTER_ANSWER", FormatError::text_after_answer);
}

void bind_records(nb::module_& m) {
    const nb::object namedtuple = nb::module_::import_("collections").attr("namedtuple");
    const auto make = [&](const char* name, const char* names) {
        nb::object made = namedtuple(name, names, nb::arg("module") = "rmr1._C");
        m.attr(name) = made;
        return made.release().ptr();
    };
    span_type = make("Span", "start end");
    item_type = make("RubricItem", "span weight");
}

void bind_verdict(nb::module_& m) {
    nb::class_<Verdict> type(m, "Verdict", nb::is_final(),
                             "What a judgment text says; see rmr1/verdict.py for every field.");
    for (const Field& field : fields) type.def_prop_ro(field.name, field.get);
    type.def_prop_ro("well_formed", [](const Verdict& v) { return v.error == FormatError::ok; });
    type.def(
        "__init__",
        [](Verdict* self, const std::optional<std::string>& answer,
           const std::optional<std::string>& task_type, const std::optional<Pair>& solution,
           const std::optional<Pair>& rubric, const std::optional<Pair>& justify,
           const std::optional<Pair>& evaluation, const std::optional<Pair>& answer_span,
           const std::vector<Pair>& quotes_a, const std::vector<Pair>& quotes_b,
           const std::vector<Pair>& summaries_a, const std::vector<Pair>& summaries_b,
           const std::vector<std::pair<Pair, std::optional<double>>>& rubric_items,
           FormatError error) {
            std::vector<rmr1::RubricItem> items;
            for (const auto& [span, weight] : rubric_items) {
                items.push_back({{span.first, span.second}, weight});
            }
            new (self) Verdict{answer_from(answer),      task_type_from(task_type), error,
                               from_python(solution),    from_python(rubric),       from_python(justify),
                               from_python(evaluation),  from_python(answer_span),  from_python(quotes_a),
                               from_python(quotes_b),    from_python(summaries_a),
                               from_python(summaries_b), std::move(items)};
        },
        nb::arg("answer") = nb::none(), nb::arg("task_type") = nb::none(),
        nb::arg("solution") = nb::none(), nb::arg("rubric") = nb::none(),
        nb::arg("justify") = nb::none(), nb::arg("evaluation") = nb::none(),
        nb::arg("answer_span") = nb::none(), nb::arg("quotes_a") = nb::tuple(),
        nb::arg("quotes_b") = nb::tuple(), nb::arg("summaries_a") = nb::tuple(),
        nb::arg("summaries_b") = nb::tuple(), nb::arg("rubric_items") = nb::tuple(),
        nb::arg("error") = FormatError::ok);
    type.def("__eq__", [](const Verdict& a, nb::handle b) -> nb::object {
        if (!nb::isinstance<Verdict>(b)) return nb::borrow(Py_NotImplemented);
        return nb::bool_(a == nb::cast<const Verdict&>(b));
    });
    type.def("__hash__", [](const Verdict& verdict) { return nb::hash(values(verdict)); });
    type.def("__repr__", &repr);
    type.def("__reduce__", [](const Verdict& verdict) {
        return nb::make_tuple(nb::type<Verdict>(), values(verdict));
    });
}

}  // namespace

void rmr1_bind_verdict(nb::module_& m) {
    bind_format_error(m);
    bind_records(m);
    bind_verdict(m);
    m.def("parse_verdict", &parse_verdict, nb::arg("text").none(), nb::arg("rule"), nb::arg("allow_tie"));
    m.def("parse_verdicts", &parse_verdicts, nb::arg("texts"), nb::arg("threads"), nb::arg("rule"),
          nb::arg("allow_tie"));
}
