# Usage: cmake -DNM=<nm> -DOBJECTS=<object files> -P check_symbols.cmake
#
# Fails when an isa_<name>.cpp.o defines a symbol with external linkage outside of bnb_cpu::<name>. Such
# a symbol can exist in several object files compiled for different processors, and the linker keeps one.
#
# It reads mangled names (Itanium ABI), in which a namespace is its length and its name: tools that spell
# them out give up on some lambdas. Only capital letters stand before the outermost namespace; in the name
# of a template of another namespace, ours would come later.

set(checked 0)
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "isa_([a-z0-9]+)\\.")
    continue()
  endif()
  set(isa "${CMAKE_MATCH_1}")
  string(LENGTH "${isa}" length)
  execute_process(COMMAND "${NM}" --defined-only --extern-only "${object}"
                  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE ";" "," symbols "${symbols}")
  string(REPLACE "\n" ";" symbols "${symbols}")
  set(own 0)
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES " _?_Z[A-Z]+7bnb_cpu${length}${isa}")
      math(EXPR own "${own} + 1")
    # What the compiler itself emits: references to the exception personality, sanitizer bookkeeping.
    elseif(symbol MATCHES "[^ ]" AND NOT symbol MATCHES " (DW\\.ref\\.__|__asan_|__odr_asan|_?_?asan\\.)")
      message(SEND_ERROR "${object}: '${symbol}' is outside of bnb_cpu::${isa}; see kernels/README.md")
    endif()
  endforeach()
  if(own EQUAL 0)
    message(SEND_ERROR "${object}: no symbol of bnb_cpu::${isa} found, has the check lost its sight?")
  endif()
  math(EXPR checked "${checked} + 1")
endforeach()
if(checked LESS 2)
  message(SEND_ERROR "only ${checked} instruction sets among: ${OBJECTS}")
endif()
message(STATUS "checked ${checked} instruction sets")
