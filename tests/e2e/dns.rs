//! Names: those of the mesh from the agent, all others from the server that was asked.

use mesh_tests::Pod;

use crate::common::{WEB_V4, WEB_V6, wait_for, web};

/// The records that dig prints.
fn dig(pod: &Pod, args: &[&str]) -> Vec<String> {
    let mut dig = pod.command("dig");
    dig.args(["+short", "+tries=1", "+time=3"]).args(args);
    let output = mesh_tests::shell::raw(&mut dig).unwrap();
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn services_by_name_over_udp_and_tcp() {
    let web = web();
    for transport in ["+notcp", "+tcp"] {
        for name in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
            assert_eq!(
                dig(&web.client, &[transport, name, "A"]),
                [WEB_V4],
                "{transport} {name}"
            );
            assert_eq!(
                dig(&web.client, &[transport, name, "AAAA"]),
                [WEB_V6],
                "{transport} {name}"
            );
        }
        // The first name in the pod's search list makes it whole.
        assert_eq!(
            dig(&web.client, &[transport, "+search", "web", "A"]),
            [WEB_V4],
            "{transport}"
        );
    }
}

#[test]
fn a_service_without_a_cluster_ip_gets_a_stable_address() {
    let web = web();
    web.mesh
        .service("free", &[], &[("http", 80, 8080)], "web")
        .unwrap();
    let response = wait_for(&web.client, "http://free/");
    assert_eq!(response.header("x-pod"), Some("web"));
    let v4 = dig(&web.client, &["free.shop.svc.cluster.local", "A"]);
    let v6 = dig(&web.client, &["free.shop.svc.cluster.local", "AAAA"]);
    assert!(v4.len() == 1 && v4[0].starts_with("240.240."), "{v4:?}");
    assert!(v6.len() == 1 && v6[0].contains(':'), "{v6:?}");
    // Another change does not move it.
    web.mesh
        .service("another", &[], &[("http", 80, 8080)], "web")
        .unwrap();
    wait_for(&web.client, "http://another/");
    assert_eq!(dig(&web.client, &["free.shop.svc.cluster.local", "A"]), v4);
    let response = web.client.curl(&[&format!("http://[{}]/", v6[0])]).unwrap();
    assert_eq!(response.status, 200);
}

#[test]
fn other_names_are_answered_by_the_server_that_was_asked() {
    let mut web = web();
    let mut one = web.mesh.stranger("one", 1).unwrap();
    let mut two = web.mesh.stranger("two", 0).unwrap();
    one.serve(&web.mesh.run, "dns", 53).unwrap();
    two.serve(&web.mesh.run, "dns", 53).unwrap();
    for transport in ["+notcp", "+tcp"] {
        for server in [&one, &two] {
            for address in [server.v4, server.v6] {
                let at = format!("@{address}");
                // That server says its own name.
                let text = dig(&web.client, &[transport, &at, "example.org", "TXT"]);
                assert_eq!(text, [format!("\"{}\"", server.spec.name)], "{transport} {at}");
                // The mesh's names are the agent's, whoever is asked.
                assert_eq!(
                    dig(&web.client, &[transport, &at, "web.shop.svc.cluster.local", "A"]),
                    [WEB_V4]
                );
            }
        }
    }
}
