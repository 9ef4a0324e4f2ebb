//! The layouts, asserted: a change that the other side would misread does not compile.

use core::mem::{align_of, offset_of, size_of};

use crate::{
    DnsKey, FastBackend, FastKey, FastPath, Flow, FlowKey, ListenerKey, NetAddr, NetEndpoint, NetPort,
    OwnSocket, Serves, Settings, SocketRecord, Traffic, TrafficKey, WorkloadEntry,
};

macro_rules! layout {
    ($name:ident, size $size:literal, align $align:literal $(, $field:ident at $offset:literal)*) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(align_of::<$name>() == $align);
            $(assert!(offset_of!($name, $field) == $offset);)*
        };
    };
}

layout!(NetAddr, size 16, align 4);
layout!(NetPort, size 2, align 2);
layout!(NetEndpoint, size 20, align 4, addr at 0, port at 16, reserved at 18);
layout!(FlowKey, size 48, align 8, workload at 0, source at 8, destination at 28);
layout!(Flow, size 32, align 8, closed_at at 0, endpoint at 8, kind at 28);
layout!(SocketRecord, size 32, align 8, workload at 0, endpoint at 8, kind at 28);
layout!(OwnSocket, size 40, align 8, workload at 0, created_at at 8, present at 16, reserved at 36);
layout!(FastKey, size 32, align 8, client at 0, destination at 8, reserved at 28);
layout!(FastBackend, size 32, align 8, server at 0, endpoint at 8, reserved at 28);
layout!(FastPath, size 520, align 8, count at 0, reserved at 4, backends at 8);
layout!(TrafficKey, size 40, align 8, client at 0, server at 8, destination at 16, kind at 36);
layout!(Traffic, size 32, align 8, opened at 0, closed at 8, received at 16, sent at 24);
layout!(DnsKey, size 16, align 8, workload at 0, slot at 8, reserved at 12);
layout!(ListenerKey, size 16, align 8, workload at 0, kind at 8, reserved at 12);
layout!(Serves, size 16, align 8, workload at 0, host at 8);
layout!(Settings, size 8, align 8, heartbeat at 0);
layout!(WorkloadEntry, size 52, align 4, v4 at 0, v6 at 16, flags at 32, outbound_port at 36,
    inbound_port at 38, dns_v4_port at 40, dns_v6_ports at 42, reserved at 50);
